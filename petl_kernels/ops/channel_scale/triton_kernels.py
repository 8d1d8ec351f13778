"""Triton kernels of `channel_scale`: the product, the backward by groups of rows, and the sum over the groups.

N rows and the row strides are run-time values, the width is a constant; row offsets are int64. Products and sums are
float32.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import sum_groups


@triton.jit
def _channel_scale_fwd_kernel(
    x_ptr, scale_ptr, y_ptr, n, stride_xm, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n) & (cols[None, :] < D)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], x * scale[None, :], mask=mask)


@triton.jit
def _channel_scale_bwd_kernel(
    g_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    dscale_ptr,
    n,
    rows_per_group,
    stride_gm,
    stride_xm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row `group` of the partial sums of dscale and, unless it is absent, dx of the group's rows."""
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    begin = group.to(tl.int64) * rows_per_group  # a multiple of BLOCK_M
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, rows_per_group, BLOCK_M):
        rows = begin + start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < n) & inside[None, :]
        g = tl.load(g_ptr + rows[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dscale += g * x
        if dx_ptr is not None:
            tl.store(dx_ptr + rows[:, None] * D + cols[None, :], g * scale, mask=mask)
    tl.store(dscale_ptr + group * D + cols, tl.sum(dscale, 0), mask=inside)


@triton.jit
def _channel_scale_bwd_sum_kernel(
    part_ptr, dscale_ptr, groups, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum the groups' shares of dscale."""
    sum_groups(part_ptr, dscale_ptr, groups, D, tl.program_id(0), BLOCK_P, BLOCK_D)
