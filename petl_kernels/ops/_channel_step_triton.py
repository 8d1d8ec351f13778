"""What the Triton optimizers share: their launch, and how a program finds its elements in the table."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from petl_kernels.ops._channel_step import FIELDS, NUMBERS, Table
from petl_kernels.ops._channel_step_device import BLOCK, on_device
from petl_kernels.ops._triton import device_of, warps

_FIELDS = tl.constexpr(len(FIELDS))
_STATE_0, _STATE_1, _STEP = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_NUMBERS = tl.constexpr(NUMBERS)


def launch_over(
    table: Table,
    kernel: triton.JITFunction,
    numbers: array[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Count the step and run `kernel` over every element of every tensor of `table`."""
    with on_device(table, numbers, found_inf) as held:
        if held is None:
            return
        options = dict(zip(("FLOAT32", "BFLOAT16", "FLOAT16"), held.dtypes), BLOCK=BLOCK)
        with torch.cuda.device(table.device) if table.device.type == "cuda" else torch.no_grad():
            kernel[(len(held.programs),)](
                held.rows,
                held.numbers,
                held.programs,
                grad_scale,
                found_inf,
                **options,
                num_warps=warps(8, device_of(table.device)),
            )


@triton.jit
def locate(rows_ptr, programs_ptr, found_inf_ptr, BLOCK: tl.constexpr):
    """Which tensor a program updates, its row of the table, and of each of its elements: whether it exists, its place
    in the states, in the parameter and in the gradient. Where `found_inf` is not zero none exists.
    """
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + 2 * pid)
    row_ptr = rows_ptr + tensor * _FIELDS
    selection = tl.load(row_ptr + 7)
    rows = tl.load(row_ptr + 8)
    cols = tl.load(row_ptr + 9)
    begin = (pid - tl.load(programs_ptr + 2 * pid + 1)) * BLOCK
    lane = tl.arange(0, BLOCK)
    element = begin + lane
    count = rows * cols
    if found_inf_ptr is not None:
        count = tl.where(tl.load(found_inf_ptr) == 0, count, 0)
    exists = element < count
    if rows == 1:
        row = tl.zeros([BLOCK], tl.int64)
        col = element
    else:
        # Within a block 32 bits do for the division: cols is below 2^31 where there are several rows.
        row_0 = begin // cols
        local = (begin - row_0 * cols).to(tl.int32) + lane
        down = local // cols.to(tl.int32)
        row = row_0 + down
        col = (local - down * cols.to(tl.int32)).to(tl.int64)
    channels_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.int64))
    if selection == 1:
        row = tl.load(channels_ptr + row, mask=exists, other=0)
    if selection == 2:
        col = tl.load(channels_ptr + col, mask=exists, other=0)
    param = row * tl.load(row_ptr + 10) + col * tl.load(row_ptr + 11)
    grad = row * tl.load(row_ptr + 12) + col * tl.load(row_ptr + 13)
    return tensor, row_ptr, exists, element, param, grad


@triton.jit
def unscaled(grad, grad_scale_ptr, maximize):
    """The gradient of what is minimised, in float32."""
    grad = grad.to(tl.float32)
    if grad_scale_ptr is not None:
        grad = grad / tl.load(grad_scale_ptr)
    return tl.where(maximize, -grad, grad)
