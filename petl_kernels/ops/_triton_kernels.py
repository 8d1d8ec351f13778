"""What Triton kernels share: tiles of matrices, sums of groups of rows in a fixed order, and dropout."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, stride_row, n_rows, cols, stride_col, n_cols):
    """The tile [rows, cols] of a matrix of n_rows x n_cols; zero outside."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, value, rows, stride_row, n_rows, cols, stride_col, n_cols):
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(ptr + rows[:, None] * stride_row + cols[None, :] * stride_col, value, mask=mask)


@triton.jit
def load_of_rows(ptr, rows, n):
    """One number of each row, in float32."""
    return tl.load(ptr + rows, mask=rows < n, other=0.0).to(tl.float32)


@triton.jit
def sum_groups(part_ptr, out_ptr, groups, size, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum over p of part[p, i] for one block of i, always in the same order."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, groups, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < groups) & (offsets[None, :] < size)
        total += tl.sum(tl.load(part_ptr + p[:, None].to(tl.int64) * size + offsets[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + offsets, total, mask=offsets < size)


@triton.jit
def sum_all(part_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out[0] = the sum of part, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + offsets, mask=offsets < count, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def sum_adapter(
    part_w_down_ptr,
    part_b_down_ptr,
    part_w_up_ptr,
    part_b_up_ptr,
    part_scale_ptr,
    dw_down_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    dscale_ptr,
    groups,
    scale_shares,
    which,
    block,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the groups' shares of a bottleneck's gradient number `which`, from 0 to 4.

    The scale has one share per group and chunk of ranks; a scalar one also sums over its channels.
    """
    if part_w_down_ptr is not None and which == 0:
        sum_groups(part_w_down_ptr, dw_down_ptr, groups, R * D_IN, block, BLOCK_P, BLOCK)
    if part_w_up_ptr is not None and which == 1:
        sum_groups(part_w_up_ptr, dw_up_ptr, groups, D_OUT * R, block, BLOCK_P, BLOCK)
    if part_b_down_ptr is not None and which == 2:
        sum_groups(part_b_down_ptr, db_down_ptr, groups, R, block, BLOCK_P, BLOCK)
    if part_b_up_ptr is not None and which == 3:
        sum_groups(part_b_up_ptr, db_up_ptr, groups, D_OUT, block, BLOCK_P, BLOCK)
    if part_scale_ptr is not None and which == 4:
        if CHANNEL_SCALE:
            sum_groups(part_scale_ptr, dscale_ptr, scale_shares, D_OUT, block, BLOCK_P, BLOCK)
        elif block == 0:
            sum_all(part_scale_ptr, dscale_ptr, scale_shares * D_OUT, BLOCK)


@triton.jit
def keep(seed_ptr, block, ranks, threshold, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """What the dropout that `ops._dropout` defines keeps of the rows from block * BLOCK_M on, bool [BLOCK_M, BLOCK_R].

    A Philox counter gives the words of four rows.
    """
    group = block.to(tl.int64) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)[:, None]
    zero = tl.zeros((BLOCK_M // 4, BLOCK_R), tl.uint32)
    low, high = zero + group.to(tl.uint32), zero + (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), zero + ranks[None, :].to(tl.uint32), low, high, zero)
    pairs = tl.join(_kept(a, threshold), _kept(b, threshold)), tl.join(_kept(c, threshold), _kept(d, threshold))
    return tl.permute(tl.join(pairs[0], pairs[1]), (0, 3, 2, 1)).reshape(BLOCK_M, BLOCK_R) != 0


@triton.jit
def _kept(word, threshold):
    return ((word >> 1).to(tl.int32) >= threshold).to(tl.int8)
