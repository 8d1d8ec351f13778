"""Triton kernels of `adapter_norm`: the forward, and the part of the backward that goes through the norm.

Common to both: N rows and strides are run-time values, widths are constants; row offsets are int64; matrix products
take operands in x's dtype and accumulate in float32. HELD: a program keeps whole rows of the sum in registers, in
float32 and in slabs of BLOCK_D columns, so that its terms are read once; else it forms slabs a second time, from the L2
cache. What follows from the gradient of the sum is the bottleneck's, and so are its kernels.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import load_tile, store_tile, sum_adapter, sum_groups
from petl_kernels.ops._triton_norm import add_statistics, finish_statistics, parameter
from petl_kernels.ops.bottleneck_adapter.triton_activations import activate, activate_grad, softmax, softmax_grad
from petl_kernels.ops.bottleneck_adapter.triton_kernels import _up_slab


@triton.jit
def _sum_slab(
    h,
    term_ptr,
    residual_ptr,
    w_up_ptr,
    b_up_ptr,
    scale_ptr,
    rows,
    n,
    stride_tm,
    stride_rm,
    cols,
    ranks,
    alpha,
    D: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The columns `cols` of u = term + residual + scale * (h w_up^T + b_up); without a term what is left of it."""
    w = load_tile(w_up_ptr, ranks, 1, R, cols, R, D)
    u = _up_slab(h, w, cols, D, b_up_ptr, None, scale_ptr, alpha, CHANNEL_SCALE, PRECISION)
    if term_ptr is not None:
        u += load_tile(term_ptr, rows, stride_tm, n, cols, 1, D).to(tl.float32)
    if residual_ptr is not None:
        u += load_tile(residual_ptr, rows, stride_rm, n, cols, 1, D).to(tl.float32)
    return u


@triton.jit
def _adapter_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    hidden_ptr,
    w_down_ptr,
    b_down_ptr,
    w_up_ptr,
    b_up_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    scale_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    n,
    stride_xm,
    stride_rm,
    stride_hm,
    alpha,
    eps,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    RMS: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SLABS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of y, z and the statistics. Without `hidden` x is a term of the sum, HELD from the first loop on."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty

    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    held = ()
    if HELD and hidden_ptr is None:
        for i in tl.static_range(SLABS):
            x = load_tile(x_ptr, rows, stride_xm, n, cols + i * BLOCK_D, 1, D_IN)
            w = load_tile(w_down_ptr, cols + i * BLOCK_D, 1, D_IN, ranks, D_IN, R)
            z = tl.dot(x, w.to(dtype), z, input_precision=PRECISION)
            held = held + (x,)  # noqa: RUF005 (Triton compiles no starred expression)
    else:
        for start in range(0, D_IN, BLOCK_D):
            x = load_tile(x_ptr, rows, stride_xm, n, start + cols, 1, D_IN)
            w = load_tile(w_down_ptr, start + cols, 1, D_IN, ranks, D_IN, R)
            z = tl.dot(x, w.to(dtype), z, input_precision=PRECISION)
    if b_down_ptr is not None:
        z += tl.load(b_down_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "softmax":
        z = softmax(z, ranks, R)
    if z_ptr is not None:
        store_tile(z_ptr, z, rows, R, n, ranks, 1, R)
    h = tl.where(ranks[None, :] < R, activate(z, ACTIVATION), 0.0).to(dtype)

    # Without `hidden` and held the term is in registers, not read again.
    term_ptr = hidden_ptr if hidden_ptr is not None else x_ptr
    stride_tm = stride_hm if hidden_ptr is not None else stride_xm
    KEPT: tl.constexpr = HELD and hidden_ptr is None
    sums = ()
    shift = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    if HELD:
        for i in tl.static_range(SLABS):
            out = cols + i * BLOCK_D
            u = _sum_slab(
                h, None if KEPT else term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n, stride_tm,
                stride_rm, out, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            if KEPT:
                u += held[i].to(tl.float32)
            sums = sums + (u,)  # noqa: RUF005
            shift, mean, square = add_statistics(u, out, tl.full((), i * BLOCK_D, tl.int32), shift, mean, square, D)
    else:
        begin = tl.full((), 0, tl.int32)
        for start in range(0, D, BLOCK_D):
            u = _sum_slab(
                h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n, stride_tm, stride_rm,
                start + cols, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            shift, mean, square = add_statistics(u, start + cols, begin + start, shift, mean, square, D)
    shift, mean, rstd = finish_statistics(shift, mean, square, eps, D, RMS)
    if HELD:
        for i in tl.static_range(SLABS):
            out = cols + i * BLOCK_D
            normal = ((sums[i] - shift[:, None]) - mean[:, None]) * rstd[:, None]
            y = normal * parameter(ln_weight_ptr, out, D, 1.0) + parameter(ln_bias_ptr, out, D, 0.0)
            store_tile(y_ptr, y, rows, D, n, out, 1, D)
    else:
        for start in range(0, D, BLOCK_D):
            out = start + cols
            u = _sum_slab(
                h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n, stride_tm, stride_rm,
                out, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            normal = ((u - shift[:, None]) - mean[:, None]) * rstd[:, None]
            y = normal * parameter(ln_weight_ptr, out, D, 1.0) + parameter(ln_bias_ptr, out, D, 0.0)
            store_tile(y_ptr, y, rows, D, n, out, 1, D)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, shift + mean, mask=rows < n)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < n)


@triton.jit
def _grad_and_normal(
    g_ptr,
    stride_gm,
    mean,
    rstd,
    h,
    term_ptr,
    residual_ptr,
    w_up_ptr,
    b_up_ptr,
    scale_ptr,
    rows,
    n,
    stride_tm,
    stride_rm,
    cols,
    ranks,
    alpha,
    D: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The columns `cols` of g and of xh = (u - mean) rstd, the sum u being formed again."""
    u = _sum_slab(
        h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n, stride_tm, stride_rm,
        cols, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
    )  # fmt: skip
    g = load_tile(g_ptr, rows, stride_gm, n, cols, 1, D)
    return g, tl.where(cols[None, :] < D, (u - mean) * rstd, 0.0)


@triton.jit
def _norm_sums(g, normal, ln_weight_ptr, dln_weight_ptr, dln_bias_ptr, tile, cols, D: tl.constexpr):
    """A slab's part of mean(gw) and mean(gw xh); and its columns of the tile's share of the norm's gradients."""
    gw = g.to(tl.float32)
    if dln_weight_ptr is not None:
        tl.store(dln_weight_ptr + tile * D + cols, tl.sum(gw * normal, 0), mask=cols < D)
    if dln_bias_ptr is not None:
        tl.store(dln_bias_ptr + tile * D + cols, tl.sum(gw, 0), mask=cols < D)
    gw *= parameter(ln_weight_ptr, cols, D, 1.0)
    return tl.sum(gw, 1) / D, tl.sum(gw * normal, 1) / D


@triton.jit
def _adapter_norm_bwd_row_kernel(
    g_ptr,
    term_ptr,
    residual_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    w_up_ptr,
    b_up_ptr,
    ln_weight_ptr,
    scale_ptr,
    du_ptr,
    dz_ptr,
    dln_weight_ptr,
    dln_bias_ptr,
    n,
    stride_gm,
    stride_tm,
    stride_rm,
    alpha,
    D: tl.constexpr,
    R: tl.constexpr,
    RMS: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SLABS: tl.constexpr,
    HELD: tl.constexpr,
    HOLD_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of du, the gradient of the sum, and of dz, and their share of the norm's gradients.

    With xh = (u - mean) rstd and gw = g ln_weight: du = rstd (gw - mean(gw) - xh mean(gw xh)), of RMSNorm without the
    second term; dln_weight = sum g xh, dln_bias = sum g.
    """
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = z_ptr.dtype.element_ty

    z = load_tile(z_ptr, rows, R, n, ranks, 1, R).to(tl.float32)
    h = tl.where(ranks[None, :] < R, activate(z, ACTIVATION), 0.0).to(dtype)
    rstd = tl.load(rstd_ptr + rows, mask=rows < n, other=0.0)[:, None]
    mean = tl.zeros((BLOCK_M, 1), tl.float32)
    if not RMS:
        mean = tl.load(mean_ptr + rows, mask=rows < n, other=0.0)[:, None]

    normals = ()
    gs = ()
    offset = tl.zeros((BLOCK_M,), tl.float32)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if HELD:
        for i in tl.static_range(SLABS):
            out = cols + i * BLOCK_D
            g, normal = _grad_and_normal(
                g_ptr, stride_gm, mean, rstd, h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n,
                stride_tm, stride_rm, out, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            more_offset, more_slope = _norm_sums(g, normal, ln_weight_ptr, dln_weight_ptr, dln_bias_ptr, tile, out, D)
            offset += more_offset
            slope += more_slope
            normals = normals + (normal,)  # noqa: RUF005
            if HOLD_G:
                gs = gs + (g,)  # noqa: RUF005
        if RMS:
            offset = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(SLABS):
            out = cols + i * BLOCK_D
            g = gs[i] if HOLD_G else load_tile(g_ptr, rows, stride_gm, n, out, 1, D)
            gw = g.to(tl.float32) * parameter(ln_weight_ptr, out, D, 1.0)
            du = (gw - offset[:, None] - normals[i] * slope[:, None]) * rstd
            if du_ptr is not None:
                store_tile(du_ptr, du, rows, D, n, out, 1, D)
            if dz_ptr is not None:
                if CHANNEL_SCALE:
                    du *= parameter(scale_ptr, out, D, 1.0)
                w = load_tile(w_up_ptr, out, R, D, ranks, 1, R)
                dh = tl.dot(du.to(dtype), w.to(dtype), dh, input_precision=PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            g, normal = _grad_and_normal(
                g_ptr, stride_gm, mean, rstd, h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n,
                stride_tm, stride_rm, start + cols, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            more_offset, more_slope = _norm_sums(
                g, normal, ln_weight_ptr, dln_weight_ptr, dln_bias_ptr, tile, start + cols, D
            )
            offset += more_offset
            slope += more_slope
        if RMS:
            offset = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, D, BLOCK_D):
            out = start + cols
            g, normal = _grad_and_normal(
                g_ptr, stride_gm, mean, rstd, h, term_ptr, residual_ptr, w_up_ptr, b_up_ptr, scale_ptr, rows, n,
                stride_tm, stride_rm, out, ranks, alpha, D, R, CHANNEL_SCALE, PRECISION,
            )  # fmt: skip
            gw = g.to(tl.float32) * parameter(ln_weight_ptr, out, D, 1.0)
            du = (gw - offset[:, None] - normal * slope[:, None]) * rstd
            if du_ptr is not None:
                store_tile(du_ptr, du, rows, D, n, out, 1, D)
            if dz_ptr is not None:
                if CHANNEL_SCALE:
                    du *= parameter(scale_ptr, out, D, 1.0)
                w = load_tile(w_up_ptr, out, R, D, ranks, 1, R)
                dh = tl.dot(du.to(dtype), w.to(dtype), dh, input_precision=PRECISION)
    if dz_ptr is not None:
        if not CHANNEL_SCALE and scale_ptr is not None:
            dh *= tl.load(scale_ptr).to(tl.float32)
        dh *= tl.cast(alpha, tl.float32)
        dz = softmax_grad(dh, z, ranks, R) if ACTIVATION == "softmax" else activate_grad(dh, z, ACTIVATION)
        store_tile(dz_ptr, dz, rows, R, n, ranks, 1, R)


@triton.jit
def _adapter_norm_bwd_sum_kernel(
    part_w_down_ptr,
    part_b_down_ptr,
    part_w_up_ptr,
    part_b_up_ptr,
    part_scale_ptr,
    part_ln_weight_ptr,
    part_ln_bias_ptr,
    dw_down_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    dscale_ptr,
    dln_weight_ptr,
    dln_bias_ptr,
    groups,
    scale_shares,
    tiles,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the shares; program axis 1 picks the gradient.

    The norm's gradients have a share per tile of rows, many and short: their blocks are tall and narrow.
    """
    block = tl.program_id(0)
    which = tl.program_id(1)
    sum_adapter(
        part_w_down_ptr, part_b_down_ptr, part_w_up_ptr, part_b_up_ptr, part_scale_ptr,
        dw_down_ptr, db_down_ptr, dw_up_ptr, db_up_ptr, dscale_ptr,
        groups, scale_shares, which, block, D_IN, D, R, CHANNEL_SCALE, BLOCK_P, BLOCK,
    )  # fmt: skip
    if part_ln_weight_ptr is not None and which == 5:
        sum_groups(part_ln_weight_ptr, dln_weight_ptr, tiles, D, block, 64, BLOCK // 8)
    if part_ln_bias_ptr is not None and which == 6:
        sum_groups(part_ln_bias_ptr, dln_bias_ptr, tiles, D, block, 64, BLOCK // 8)
