"""Triton kernels of `channel_adapter`: one for the forward, and for the backward one and an ordered sum.

Both directions do the same to a matrix [n, d]: copy it but for the chosen columns, and put their transform there. The
program that gathers a row's chosen channels also copies the row, so that memory is read once. Columns that are not
chosen and those that are go through disjoint stores: nothing is written twice, and no barrier orders the two.

Common to all: n rows and the row strides are run-time values, the widths are constants; row offsets are int64; what
lies outside a matrix is read as zero; products take operands in x's dtype and accumulate in float32; an optional
tensor that is absent is passed as None, which removes its code.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import sum_all, sum_groups


@triton.jit
def _gather(ptr, rows, stride, n, channels, K: tl.constexpr):
    """The tile of the columns that `channels` = (position, channel) name: zero past row n or position K."""
    position, channel = channels
    mask = (rows[:, None] < n) & (position[None, :] < K)
    return tl.load(ptr + rows[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _channels(channels_ptr, start, K: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK positions from `start` on and the channels there; past K one that no column has."""
    position = start + tl.arange(0, BLOCK)
    return position, tl.load(channels_ptr + position, mask=position < K, other=-1)


@triton.jit
def _weight(ptr, ins, outs, stride_in: tl.constexpr, stride_out: tl.constexpr, K: tl.constexpr):
    """The tile [ins, outs] of the square matrix that a row is multiplied with."""
    mask = (ins[:, None] < K) & (outs[None, :] < K)
    return tl.load(ptr + ins[:, None] * stride_in + outs[None, :] * stride_out, mask=mask, other=0.0)


@triton.jit
def _scale(scale_ptr, alpha):
    s = tl.cast(alpha, tl.float32)
    if scale_ptr is not None:
        s *= tl.load(scale_ptr).to(tl.float32)
    return s


@triton.jit
def _transform(
    from_ptr,
    stride,
    channels_ptr,
    weight_ptr,
    bias_ptr,
    s,
    to_ptr,
    keep_ptr,
    rows,
    n,
    D: tl.constexpr,
    K: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`to` = `from`, but to_C = from_C + s u, or s from_C + u, where u = from_C W + bias, in the given rows.

    W[i, j] lies at i * STRIDE_IN + j * STRIDE_OUT. `keep` receives from_C [n, K].
    """
    for start in range(0, K, BLOCK_K):
        outs = _channels(channels_ptr, start, K, BLOCK_K)
        x = _gather(from_ptr, rows, stride, n, outs, K)
        if K <= BLOCK_K:
            w = _weight(weight_ptr, outs[0], outs[0], STRIDE_IN, STRIDE_OUT, K)
            u = tl.dot(x, w.to(x.dtype), input_precision=PRECISION)
        else:
            u = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for start_in in range(0, K, BLOCK_K):
                ins = _channels(channels_ptr, start_in, K, BLOCK_K)
                x_in = _gather(from_ptr, rows, stride, n, ins, K)
                w = _weight(weight_ptr, ins[0], outs[0], STRIDE_IN, STRIDE_OUT, K)
                u = tl.dot(x_in, w.to(x_in.dtype), u, input_precision=PRECISION)
        if bias_ptr is not None:
            u += tl.load(bias_ptr + outs[0], mask=outs[0] < K, other=0.0).to(tl.float32)[None, :]
        wide = x.to(tl.float32)
        y = s * wide + u if SCALE_INPUT else wide + s * u
        mask = (rows[:, None] < n) & (outs[0][None, :] < K)
        tl.store(to_ptr + rows[:, None] * D + outs[1][None, :], y, mask=mask)
        if keep_ptr is not None:
            tl.store(keep_ptr + rows[:, None] * K + outs[0][None, :], x, mask=mask)

    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        hits = tl.zeros((BLOCK_D,), tl.int32)
        for k in range(0, K, 32):
            listed = _channels(channels_ptr, k, K, 32)
            hits += tl.sum((cols[:, None] == listed[1][None, :]).to(tl.int32), 1)
        mask = (rows[:, None] < n) & ((cols < D) & (hits == 0))[None, :]
        tile = tl.load(from_ptr + rows[:, None] * stride + cols[None, :], mask=mask)
        tl.store(to_ptr + rows[:, None] * D + cols[None, :], tile, mask=mask)


@triton.jit
def _channel_adapter_fwd_kernel(
    x_ptr,
    channels_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    y_ptr,
    x_channels_ptr,
    n,
    stride_xm,
    alpha,
    D: tl.constexpr,
    K: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows of y and x_channels."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    _transform(
        x_ptr,
        stride_xm,
        channels_ptr,
        weight_ptr,
        bias_ptr,
        _scale(scale_ptr, alpha),
        y_ptr,
        x_channels_ptr,
        rows,
        n,
        D,
        K,
        1,  # W = weight^T
        K,
        SCALE_INPUT,
        PRECISION,
        BLOCK_M,
        BLOCK_D,
        BLOCK_K,
    )


@triton.jit
def _channel_adapter_bwd_kernel(
    g_ptr,
    x_channels_ptr,
    channels_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    n,
    stride_gm,
    alpha,
    row_blocks,
    groups,
    D: tl.constexpr,
    K: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The first `row_blocks` programs write BLOCK_M rows of dx each, the others shares of the parameters' gradients.

    Of these there are `groups` per tile of M = g_C^T x_C, BLOCK_S x BLOCK_S; without M one column of tiles, which also
    sums g_C. A gradient's pointer is None when not asked for. The shares of group p are written at p times the
    gradient's size, dscale's at (p, tile): into workspace, or, where there is one of each, into the gradients.
    """
    pid = tl.program_id(0)
    s = _scale(scale_ptr, alpha)
    if pid < row_blocks:
        if dx_ptr is not None:
            rows = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            _transform(
                g_ptr,
                stride_gm,
                channels_ptr,
                weight_ptr,
                None,
                s,
                dx_ptr,
                None,
                rows,
                n,
                D,
                K,
                K,  # W = weight
                1,
                SCALE_INPUT,
                PRECISION,
                BLOCK_M,
                BLOCK_D,
                BLOCK_K,
            )
    else:
        WANT_M: tl.constexpr = dweight_ptr is not None or dscale_ptr is not None
        WANT_SUM: tl.constexpr = dbias_ptr is not None or (dscale_ptr is not None and bias_ptr is not None)
        SIDE: tl.constexpr = (K + BLOCK_S - 1) // BLOCK_S
        TILES: tl.constexpr = SIDE * SIDE if WANT_M else SIDE
        group = (pid - row_blocks) // TILES
        tile = (pid - row_blocks) % TILES
        down = tile // SIDE if WANT_M else tile
        across = tile % SIDE if WANT_M else 0
        ins = across * BLOCK_S + tl.arange(0, BLOCK_S)
        outs = _channels(channels_ptr, down * BLOCK_S, K, BLOCK_S)
        m = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
        total = tl.zeros((BLOCK_S,), tl.float32)
        # Backward: what the programs before read last of g is read first, from the L2 cache.
        blocks = tl.cdiv(n, BLOCK_N)
        for i in range(group, blocks, groups):
            rows = (blocks - 1 - i).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            g = _gather(g_ptr, rows, stride_gm, n, outs, K)
            if WANT_M:
                mask = (rows[:, None] < n) & (ins[None, :] < K)
                x = tl.load(x_channels_ptr + rows[:, None] * K + ins[None, :], mask=mask, other=0.0)
                m = tl.dot(tl.trans(g), x, m, input_precision=PRECISION)
            if WANT_SUM:
                total += tl.sum(g.to(tl.float32), 0)

        inner = 1.0 if SCALE_INPUT else s
        first = (outs[0] < K) & (across == 0)
        if dweight_ptr is not None:
            mask = (outs[0][:, None] < K) & (ins[None, :] < K)
            tl.store(dweight_ptr + group * (K * K) + outs[0][:, None] * K + ins[None, :], m * inner, mask=mask)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + group * K + outs[0], total * inner, mask=first)
        if dscale_ptr is not None:
            if SCALE_INPUT:
                share = tl.sum(tl.where(outs[0][:, None] == ins[None, :], m, 0.0))
            else:
                # Positions past K have zeros in w, but m may hold 0 * inf there.
                w = _weight(weight_ptr, outs[0], ins, K, 1, K).to(tl.float32)
                share = tl.sum(tl.where((outs[0][:, None] < K) & (ins[None, :] < K), w * m, 0.0))
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + outs[0], mask=first, other=0.0).to(tl.float32)
                    share += tl.sum(tl.where(first, bias * total, 0.0))
            tl.store(dscale_ptr + group * TILES + tile, share)


@triton.jit
def _channel_adapter_bwd_sum_kernel(
    part_weight_ptr,
    part_bias_ptr,
    part_scale_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    groups,
    scale_shares,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the groups' shares; program axis 1 picks the gradient."""
    block = tl.program_id(0)
    which = tl.program_id(1)
    if part_weight_ptr is not None and which == 0:
        sum_groups(part_weight_ptr, dweight_ptr, groups, K * K, block, BLOCK_P, BLOCK)
    if part_bias_ptr is not None and which == 1:
        sum_groups(part_bias_ptr, dbias_ptr, groups, K, block, BLOCK_P, BLOCK)
    if part_scale_ptr is not None and which == 2 and block == 0:
        sum_all(part_scale_ptr, dscale_ptr, scale_shares, BLOCK)
