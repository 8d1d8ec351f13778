"""The Triton kernel of `channel_sgd_`."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._channel_step_triton import _NUMBERS, _STATE_0, _STEP, locate, unscaled


@triton.jit
def _update(row_ptr, numbers_ptr, grad_scale_ptr, exists, element, param_at, grad_at, DTYPE: tl.constexpr):
    """Elements of one tensor, whose dtype is DTYPE."""
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE)) + param_at
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE)) + grad_at
    buffer = tl.load(row_ptr + _STATE_0)
    lr = tl.load(numbers_ptr).to(tl.float32)
    momentum = tl.load(numbers_ptr + 1).to(tl.float32)
    weight = (1.0 - tl.load(numbers_ptr + 2)).to(tl.float32)
    weight_decay = tl.load(numbers_ptr + 3).to(tl.float32)
    nesterov = tl.load(numbers_ptr + 4) != 0

    g = unscaled(tl.load(grad_ptr, mask=exists, other=0.0), grad_scale_ptr, tl.load(numbers_ptr + 5) != 0)
    p = tl.load(param_ptr, mask=exists, other=0.0).to(tl.float32)
    if weight_decay != 0:
        g = g + weight_decay * p
    if buffer != 0:
        step = tl.load(tl.load(row_ptr + _STEP).to(tl.pointer_type(tl.float32)))
        buffer_ptr = buffer.to(tl.pointer_type(DTYPE)) + element
        b = tl.load(buffer_ptr, mask=exists, other=0.0).to(tl.float32)
        b = tl.where(step == 1, g, momentum * b + weight * g)  # the first gradient is not dampened
        tl.store(buffer_ptr, b.to(DTYPE), mask=exists)
        g = tl.where(nesterov, g + momentum * b, b)
    tl.store(param_ptr, (p - lr * g).to(DTYPE), mask=exists)


@triton.jit
def _channel_sgd_kernel(
    rows_ptr,
    numbers_ptr,
    programs_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    FLOAT32: tl.constexpr,
    BFLOAT16: tl.constexpr,
    FLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program updates BLOCK elements of one tensor; nothing where `found_inf` is not zero."""
    tensor, row_ptr, exists, element, param_at, grad_at = locate(rows_ptr, programs_ptr, found_inf_ptr, BLOCK)
    numbers_ptr += tensor * _NUMBERS
    dtype = tl.load(row_ptr + 6)
    # Nested, so that the code of a dtype that no tensor has is not compiled.
    if FLOAT32:  # noqa: SIM102
        if dtype == 0:
            _update(row_ptr, numbers_ptr, grad_scale_ptr, exists, element, param_at, grad_at, tl.float32)
    if BFLOAT16:  # noqa: SIM102
        if dtype == 1:
            _update(row_ptr, numbers_ptr, grad_scale_ptr, exists, element, param_at, grad_at, tl.bfloat16)
    if FLOAT16:  # noqa: SIM102
        if dtype == 2:
            _update(row_ptr, numbers_ptr, grad_scale_ptr, exists, element, param_at, grad_at, tl.float16)
