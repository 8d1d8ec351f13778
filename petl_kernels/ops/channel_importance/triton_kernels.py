"""Triton kernels of `channel_importance`: sums over groups of rows, and the sum over the groups.

N rows, the row strides and the rows of a sample are run-time values; d is a constant; row offsets are int64. Products
and the sums of a lane are float32; what is left of a tile at the end of a group or of a sample is added up in float64,
because the square of a sum doubles its relative error.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _products(a_ptr, g_ptr, rows, end, stride_am, stride_gm, cols, D: tl.constexpr, REDUCTION: tl.constexpr):
    """What each element of the tile [rows, cols] contributes, in float32; zero outside."""
    mask = (rows[:, None] < end) & (cols[None, :] < D)
    a = tl.load(a_ptr + rows[:, None] * stride_am + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + rows[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    product = a * g
    if REDUCTION == "abs":
        return tl.abs(product)
    elif REDUCTION == "sq_sample_of_rows":
        return product * product
    else:
        return product


@triton.jit
def _channel_importance_fwd_kernel(
    a_ptr,
    g_ptr,
    out_ptr,
    units,
    units_per_group,
    sample_rows,
    stride_am,
    stride_gm,
    D: tl.constexpr,
    REDUCTION: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[group, cols]: the sum over the group's rows or, for "sq_sample", over its whole samples, squared one by one.

    A unit is a sample of `sample_rows` rows for "sq_sample", and a row otherwise.
    """
    group = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = group.to(tl.int64) * units_per_group
    end = tl.minimum(begin + units_per_group, units)
    lanes = tl.arange(0, BLOCK_M)
    if REDUCTION == "sq_sample":
        total = tl.zeros((BLOCK_D,), tl.float64)
        for sample in range(begin, end):
            first, last = sample * sample_rows, (sample + 1) * sample_rows
            sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for row in range(first, last, BLOCK_M):
                sums += _products(a_ptr, g_ptr, row + lanes, last, stride_am, stride_gm, cols, D, REDUCTION)
            score = tl.sum(sums.to(tl.float64), 0)
            total += score * score
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for row in range(begin, end, BLOCK_M):
            sums += _products(a_ptr, g_ptr, row + lanes, end, stride_am, stride_gm, cols, D, REDUCTION)
        total = tl.sum(sums.to(tl.float64), 0)
    if ONE_GROUP and REDUCTION == "sq_batch":
        total *= total
    tl.store(out_ptr + group * D + cols, total, mask=cols < D)


@triton.jit
def _channel_importance_sum_kernel(
    part_ptr, out_ptr, groups, D: tl.constexpr, SQUARE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[cols] = the sum over p of part[p, cols], always in the same order, and squared if so wanted."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    for start in range(0, groups, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        mask = (parts[:, None] < groups) & (cols[None, :] < D)
        sums += tl.load(part_ptr + parts[:, None] * D + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if SQUARE:
        total *= total
    tl.store(out_ptr + cols, total, mask=cols < D)
