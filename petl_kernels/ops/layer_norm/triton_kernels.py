"""Triton kernels of `layer_norm`: the forward, the backward by groups of rows, and the sum over the groups.

N rows and the row strides are run-time values, the width is a constant; row offsets are int64. A program holds whole
rows in registers, so that each is read once; statistics, gradients and their sums are float32.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import sum_groups


@triton.jit
def _parameter(ptr, cols, D: tl.constexpr, absent):
    """A vector [1, BLOCK_D] in float32; `absent` throughout where there is none."""
    if ptr is not None:
        return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.full((1, cols.shape[0]), absent, tl.float32)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n,
    stride_xm,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    inside = cols[None, :] < D
    mask = (rows[:, None] < n) & inside
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    # What the mean lacks, rounded as it is: where |mean| is far above sigma it would be the largest error.
    missing = tl.sum(deviation, 1) / D
    deviation = tl.where(inside, deviation - missing[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / D + tl.cast(eps, tl.float32))
    y = deviation * rstd[:, None] * _parameter(weight_ptr, cols, D, 1.0) + _parameter(bias_ptr, cols, D, 0.0)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y, mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean + missing, mask=rows < n)
        tl.store(rstd_ptr + rows, rstd, mask=rows < n)


@triton.jit
def _layer_norm_bwd_kernel(
    g_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    n,
    rows_per_group,
    stride_gm,
    stride_xm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx of the group's rows, and row `group` of the partial sums of dweight and dbias; absent ones are not made."""
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols[None, :] < D
    begin = group.to(tl.int64) * rows_per_group  # a multiple of BLOCK_M
    dweight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, rows_per_group, BLOCK_M):  # counted in 32 bits: in 64 the widest rows spilled on sm_100
        rows = begin + start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < n) & inside
        g = tl.load(g_ptr + rows[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if dbias_ptr is not None:
            dbias += g
        if x_ptr is not None:
            x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=rows < n, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n, other=0.0)[:, None]
            normal = tl.where(inside, (x - mean[:, None]) * rstd, 0.0)
            if dweight_ptr is not None:
                dweight += g * normal
            if dx_ptr is not None:
                gw = g * _parameter(weight_ptr, cols, D, 1.0)
                offset = tl.sum(gw, 1)[:, None] / D
                slope = tl.sum(gw * normal, 1)[:, None] / D
                dx = (gw - offset - normal * slope) * rstd
                tl.store(dx_ptr + rows[:, None] * D + cols[None, :], dx, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + group * D + cols, tl.sum(dweight, 0), mask=cols < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * D + cols, tl.sum(dbias, 0), mask=cols < D)


@triton.jit
def _layer_norm_bwd_sum_kernel(
    part_weight_ptr,
    part_bias_ptr,
    dweight_ptr,
    dbias_ptr,
    groups,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the groups' shares; program axis 1 picks the gradient."""
    block = tl.program_id(0)
    which = tl.program_id(1)
    if part_weight_ptr is not None and which == 0:
        sum_groups(part_weight_ptr, dweight_ptr, groups, D, block, BLOCK_P, BLOCK_D)
    if part_bias_ptr is not None and which == 1:
        sum_groups(part_bias_ptr, dbias_ptr, groups, D, block, BLOCK_P, BLOCK_D)
