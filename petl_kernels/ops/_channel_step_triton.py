"""What the Triton optimizers share: the table on the device, and how a program finds its elements in it."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from petl_kernels.ops._channel_step import FIELDS, NUMBERS, Table
from petl_kernels.ops._triton import device_of, warps

BLOCK = 1024  # elements of a program

_FIELDS = tl.constexpr(len(FIELDS))
_STATE_0, _STATE_1, _STEP = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_NUMBERS = tl.constexpr(NUMBERS)


class DeviceTable:
    """A table on its device, uploaded again when an address or a hyper-parameter has changed.

    Behind the rows of the table stand the hyper-parameters (float64, as bits), and in `programs` the tensor of each
    program and the first program of that tensor.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._device = table.device
        blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in table.sizes])
        owner = torch.repeat_interleave(torch.arange(table.count), blocks)
        first = blocks.cumsum(0) - blocks
        self._programs = torch.stack([owner, first[owner]], 1).contiguous().to(self._device)
        self._dtypes = tuple(code in table.rows[FIELDS.index("dtype") :: len(FIELDS)] for code in range(3))
        self._uploaded: tuple[array, array] | None = None

    @classmethod
    def of(cls, table: Table) -> DeviceTable:
        """The one that belongs to `table`, made once."""
        if table.on_device is None:
            table.on_device = cls(table)
        return table.on_device

    def launch(
        self, kernel: triton.JITFunction, numbers: array[float], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Run `kernel` over every element of every tensor."""
        rows = self._table.rows
        if self._uploaded != (rows, numbers):
            self._uploaded = (rows[:], numbers[:])
            bits = torch.frombuffer(array("q", rows.tobytes() + numbers.tobytes()), dtype=torch.int64)
            self._rows = bits.to(self._device, copy=True)
            self._numbers = self._rows[len(rows) :].view(torch.float64)
        if not len(self._programs):
            return
        options = dict(zip(("FLOAT32", "BFLOAT16", "FLOAT16"), self._dtypes), BLOCK=BLOCK)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else torch.no_grad():
            kernel[(len(self._programs),)](
                self._rows,
                self._numbers,
                self._programs,
                grad_scale,
                found_inf,
                **options,
                num_warps=warps(8, device_of(self._device)),
            )


@contextmanager
def advance(steps: Sequence[Tensor], found_inf: Tensor | None) -> Iterator[None]:
    """Count the step before the block and take it back after it where `found_inf` says so; the host does not ask."""
    counted = [t for t in steps if t.numel()]
    if counted:
        torch._foreach_add_(counted, 1)
    yield
    if counted and found_inf is not None:
        torch._foreach_sub_(counted, [(found_inf != 0).to(torch.float32).reshape(())] * len(counted))


def launch_over(
    table: Table,
    kernel: triton.JITFunction,
    numbers: array[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Count the step and run `kernel` over every element of every tensor of `table`."""
    if table.count == 0:
        return
    on_device = DeviceTable.of(table)
    # The kernel reads the counters after this, and no program waits for another that writes one.
    with advance(table.steps, found_inf):
        on_device.launch(kernel, numbers, grad_scale, found_inf)


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
