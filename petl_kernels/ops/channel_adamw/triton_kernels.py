"""The Triton kernel of `channel_adamw_`."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._channel_step_triton import _NUMBERS, _STATE_0, _STATE_1, _STEP, locate, unscaled


@triton.jit
def _update(row_ptr, numbers_ptr, grad_scale_ptr, exists, element, param_at, grad_at, DTYPE: tl.constexpr):
    """Elements of one tensor, whose dtype is DTYPE."""
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE)) + param_at
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE)) + grad_at
    m_ptr = tl.load(row_ptr + _STATE_0).to(tl.pointer_type(DTYPE)) + element
    v_ptr = tl.load(row_ptr + _STATE_1).to(tl.pointer_type(DTYPE)) + element
    step = tl.load(tl.load(row_ptr + _STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    lr = tl.load(numbers_ptr)
    beta1 = tl.load(numbers_ptr + 1)
    beta2 = tl.load(numbers_ptr + 2)
    # beta ** step in float64, since 1 - 0.999 alone loses four digits of a float32; of 0 there is no logarithm.
    correction1 = 1.0 - tl.exp(step * tl.log(tl.maximum(beta1, 1e-300)))
    correction2 = 1.0 - tl.exp(step * tl.log(tl.maximum(beta2, 1e-300)))
    decay = (1.0 - lr * tl.load(numbers_ptr + 4)).to(tl.float32)
    eps = tl.load(numbers_ptr + 3).to(tl.float32)
    step_size = (lr / correction1).to(tl.float32)
    root2 = tl.sqrt(correction2).to(tl.float32)
    weight1 = (1.0 - beta1).to(tl.float32)
    weight2 = (1.0 - beta2).to(tl.float32)

    g = unscaled(tl.load(grad_ptr, mask=exists, other=0.0), grad_scale_ptr, tl.load(numbers_ptr + 5) != 0)
    p = tl.load(param_ptr, mask=exists, other=0.0).to(tl.float32) * decay
    m = tl.load(m_ptr, mask=exists, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=exists, other=0.0).to(tl.float32)
    m = tl.where(weight1 < 0.5, m + weight1 * (g - m), g - (g - m) * (1.0 - weight1))  # torch.lerp
    v = v * beta2.to(tl.float32) + weight2 * g * g
    p = p - step_size * m / (tl.sqrt(v) / root2 + eps)
    tl.store(param_ptr, p.to(DTYPE), mask=exists)
    tl.store(m_ptr, m.to(DTYPE), mask=exists)
    tl.store(v_ptr, v.to(DTYPE), mask=exists)


@triton.jit
def _channel_adamw_kernel(
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
