"""Triton kernels of `channel_linear`: the gradient of the trained part, and the ordered sum of its partial sums.

With dim=0 the trained part is k rows of the weight [d_out, d_in], with dim=1 k of its columns; either way its gradient
[outs, ins] is g[:, outs]^T x[:, ins], and only where g's columns come from differs: through `channels`, or in order.
The number of rows of x, the number of `outs` and the row strides are run-time values (a new batch size or another
number of trained rows compiles nothing); row offsets are int64; what lies outside a matrix is read as zero.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import sum_groups


@triton.jit
def _load_rows(ptr, block, stride, n, cols, inside, BLOCK_M: tl.constexpr):
    """The columns `cols` of a block of BLOCK_M rows; zero below row n and where a column is not `inside`."""
    rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows[:, None] < n) & inside[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _channel_linear_bwd_kernel(
    g_ptr,
    x_ptr,
    channels_ptr,
    dweight_ptr,
    dbias_ptr,
    n,
    outs,
    stride_gm,
    stride_xm,
    INS: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The tile [BLOCK_O, BLOCK_I] of the weight's gradient over one group of rows, and from the first tile of a row of
    tiles the bias's.

    Program axes: tile of k, tile of the frozen dimension, group. Tiles of k are neighbours, because they read the same
    columns of the large operand. Without channels (dim=1) k are the `ins`. x_ptr is None when only the bias trains,
    dbias_ptr when it does not. MIXED: the dtypes of g and x differ. The share of group p is written at p
    times the gradient's size: into workspace, or, of a single group, into the gradient itself.
    """
    GATHERED: tl.constexpr = channels_ptr is not None
    out_tile = tl.program_id(0) if GATHERED else tl.program_id(1)
    in_tile = tl.program_id(1) if GATHERED else tl.program_id(0)
    group = tl.program_id(2)
    out = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    ins = in_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    cols = tl.load(channels_ptr + out, mask=out < outs, other=0) if GATHERED else out
    blocks, groups = tl.cdiv(n, BLOCK_M), tl.num_programs(2)

    # A gather of 2-byte elements cannot be an asynchronous copy, and Triton would wait for it in every iteration: the
    # next block of g is under way, in registers, while this one is multiplied. So are both operands, in float32, where
    # their dtypes differ: of a cast beside the product Triton 3.7 makes tf32 on Blackwell, whatever the precision.
    AHEAD: tl.constexpr = MIXED or GATHERED
    dtype: tl.constexpr = tl.float32 if MIXED else g_ptr.dtype.element_ty
    if AHEAD:
        next_g = _load_rows(g_ptr, group, stride_gm, n, cols, out < outs, BLOCK_M).to(dtype)
    if MIXED:
        next_x = _load_rows(x_ptr, group, stride_xm, n, ins, ins < INS, BLOCK_M).to(dtype)

    dweight = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)  # summed over its rows once, at the end
    for i in range(group, blocks, groups):
        if AHEAD:
            g = next_g
            next_g = _load_rows(g_ptr, i + groups, stride_gm, n, cols, out < outs, BLOCK_M).to(dtype)
        else:
            g = _load_rows(g_ptr, i, stride_gm, n, cols, out < outs, BLOCK_M)
        if MIXED:
            x = next_x
            next_x = _load_rows(x_ptr, i + groups, stride_xm, n, ins, ins < INS, BLOCK_M).to(dtype)
        elif x_ptr is not None:
            x = _load_rows(x_ptr, i, stride_xm, n, ins, ins < INS, BLOCK_M)
        if x_ptr is not None:
            dweight = tl.dot(tl.trans(g), x, dweight, input_precision=PRECISION)
        if dbias_ptr is not None and in_tile == 0:
            dbias += g.to(tl.float32)

    share = group.to(tl.int64) * outs
    if x_ptr is not None:
        offsets = (share + out)[:, None] * INS + ins[None, :]
        tl.store(dweight_ptr + offsets, dweight, mask=(out[:, None] < outs) & (ins[None, :] < INS))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + share + out, tl.sum(dbias, 0), mask=(out < outs) & (in_tile == 0))


@triton.jit
def _channel_linear_bwd_sum_kernel(
    part_weight_ptr,
    part_bias_ptr,
    dweight_ptr,
    dbias_ptr,
    groups,
    size,
    outs,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the groups' shares: of the weight's gradient (`size` elements), in the programs after it of the bias's."""
    block = tl.program_id(0)
    of_weight = tl.cdiv(size, BLOCK)
    if part_weight_ptr is not None and block < of_weight:
        sum_groups(part_weight_ptr, dweight_ptr, groups, size, block, BLOCK_P, BLOCK)
    if part_bias_ptr is not None and block >= of_weight:
        sum_groups(part_bias_ptr, dbias_ptr, groups, outs, block - of_weight, BLOCK_P, BLOCK)
