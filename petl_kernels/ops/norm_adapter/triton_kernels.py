"""Triton kernels of `norm_adapter`: the forward, the rows of the backward, and the sum over groups of rows.

Common to all: N rows and strides are run-time values, widths are constants; row offsets are int64; matrix products take
operands in x's dtype and accumulate in float32. The normalised rows exist only in registers. Between the rows and the
sum the backward is the bottleneck's kernel over slabs of channels, which forms them again from x, mean and rstd.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import load_tile, store_tile, sum_all, sum_groups
from petl_kernels.ops._triton_norm import add_statistics, finish_statistics, parameter
from petl_kernels.ops.bottleneck_adapter.triton_activations import activate, activate_grad, softmax, softmax_grad
from petl_kernels.ops.bottleneck_adapter.triton_kernels import _up_slab


@triton.jit
def _normalised(x, shift, mean, rstd, weight_ptr, bias_ptr, cols, D: tl.constexpr):
    """norm(x) of a slab of x, in x's dtype, as the branch reads it; zero outside."""
    normal = ((x.to(tl.float32) - shift[:, None]) - mean[:, None]) * rstd[:, None]
    u = normal * parameter(weight_ptr, cols, D, 1.0) + parameter(bias_ptr, cols, D, 0.0)
    return tl.where(cols[None, :] < D, u, 0.0).to(x.dtype)


@triton.jit
def _norm_adapter_fwd_kernel(
    x_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    w_down_ptr,
    b_down_ptr,
    w_up_ptr,
    b_up_ptr,
    residual_ptr,
    scale_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    n,
    stride_xm,
    stride_rm,
    alpha,
    eps,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    RMS: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD_X: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of y, z and the statistics. SLABS > 0: x stays in registers, in slabs of BLOCK_D columns.

    ADD_X: the residual is x.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty

    shift = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    held = ()
    if SLABS > 0:
        for i in tl.static_range(SLABS):
            x = load_tile(x_ptr, rows, stride_xm, n, cols + i * BLOCK_D, 1, D_IN)
            begin = tl.full((), i * BLOCK_D, tl.int32)
            shift, mean, square = add_statistics(x.to(tl.float32), cols + i * BLOCK_D, begin, shift, mean, square, D_IN)
            held = held + (x,)  # noqa: RUF005 (Triton compiles no starred expression)
    else:
        begin = tl.full((), 0, tl.int32)
        for start in range(0, D_IN, BLOCK_D):
            x = load_tile(x_ptr, rows, stride_xm, n, start + cols, 1, D_IN).to(tl.float32)
            shift, mean, square = add_statistics(x, start + cols, begin + start, shift, mean, square, D_IN)
    shift, mean, rstd = finish_statistics(shift, mean, square, eps, D_IN, RMS)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, shift + mean, mask=rows < n)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < n)

    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if SLABS > 0:
        for i in tl.static_range(SLABS):
            at = cols + i * BLOCK_D
            u = _normalised(held[i], shift, mean, rstd, ln_weight_ptr, ln_bias_ptr, at, D_IN)
            w = load_tile(w_down_ptr, at, 1, D_IN, ranks, D_IN, R)
            z = tl.dot(u, w.to(dtype), z, input_precision=PRECISION)
    else:
        for start in range(0, D_IN, BLOCK_D):
            x = load_tile(x_ptr, rows, stride_xm, n, start + cols, 1, D_IN)
            u = _normalised(x, shift, mean, rstd, ln_weight_ptr, ln_bias_ptr, start + cols, D_IN)
            w = load_tile(w_down_ptr, start + cols, 1, D_IN, ranks, D_IN, R)
            z = tl.dot(u, w.to(dtype), z, input_precision=PRECISION)
    if b_down_ptr is not None:
        z += tl.load(b_down_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "softmax":
        z = softmax(z, ranks, R)
    if z_ptr is not None:
        store_tile(z_ptr, z, rows, R, n, ranks, 1, R)
    h = tl.where(ranks[None, :] < R, activate(z, ACTIVATION), 0.0).to(dtype)

    if SLABS > 0 and ADD_X:
        for i in tl.static_range(SLABS):
            at = cols + i * BLOCK_D
            w = load_tile(w_up_ptr, ranks, 1, R, at, R, D_OUT)
            y = _up_slab(h, w, at, D_OUT, b_up_ptr, None, scale_ptr, alpha, CHANNEL_SCALE, PRECISION)
            store_tile(y_ptr, y + held[i].to(tl.float32), rows, D_OUT, n, at, 1, D_OUT)
    else:
        for start in range(0, D_OUT, BLOCK_D):
            at = start + cols
            w = load_tile(w_up_ptr, ranks, 1, R, at, R, D_OUT)
            y = _up_slab(h, w, at, D_OUT, b_up_ptr, None, scale_ptr, alpha, CHANNEL_SCALE, PRECISION)
            if residual_ptr is not None:
                y += load_tile(residual_ptr, rows, stride_rm, n, at, 1, D_OUT).to(tl.float32)
            store_tile(y_ptr, y, rows, D_OUT, n, at, 1, D_OUT)


@triton.jit
def _norm_adapter_bwd_row_kernel(
    g_ptr,
    z_ptr,
    w_down_ptr,
    b_down_ptr,
    w_up_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    scale_ptr,
    dz_ptr,
    offset_ptr,
    slope_ptr,
    n,
    stride_gm,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of dz, and what the norm takes off dx in rank space.

    With Wd = w_down diag(weight), gw = dz Wd and z = Wd xh + c, where c = w_down bias + b_down:
    mean(gw) = dz . (Wd 1) / d and mean(gw xh) = dz . (z - c) / d, so that x is not read for them.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = z_ptr.dtype.element_ty

    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, D_OUT, BLOCK_D):
        g = load_tile(g_ptr, rows, stride_gm, n, start + cols, 1, D_OUT)
        if CHANNEL_SCALE:
            g = g.to(tl.float32) * parameter(scale_ptr, start + cols, D_OUT, 1.0)
        w = load_tile(w_up_ptr, start + cols, R, D_OUT, ranks, 1, R)
        dh = tl.dot(g.to(dtype), w.to(dtype), dh, input_precision=PRECISION)
    if not CHANNEL_SCALE and scale_ptr is not None:
        dh *= tl.load(scale_ptr).to(tl.float32)
    dh *= tl.cast(alpha, tl.float32)
    z = load_tile(z_ptr, rows, R, n, ranks, 1, R).to(tl.float32)
    dz = softmax_grad(dh, z, ranks, R) if ACTIVATION == "softmax" else activate_grad(dh, z, ACTIVATION)
    dz = tl.where(ranks[None, :] < R, dz, 0.0).to(dtype)
    store_tile(dz_ptr, dz, rows, R, n, ranks, 1, R)
    if slope_ptr is not None:
        dz = dz.to(tl.float32)
        if ACTIVATION == "softmax":  # saved is the value; dz sums to zero, so that a constant beside z does not matter
            z = tl.log(tl.where(z > 0, z, 1.0))
        ones = tl.zeros((BLOCK_R,), tl.float32)
        c = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, D_IN, BLOCK_D):
            w = load_tile(w_down_ptr, start + cols, 1, D_IN, ranks, D_IN, R).to(dtype).to(tl.float32)
            ones += tl.sum(w * tl.trans(parameter(ln_weight_ptr, start + cols, D_IN, 1.0)), 0)
            if ln_bias_ptr is not None:
                c += tl.sum(w * tl.trans(parameter(ln_bias_ptr, start + cols, D_IN, 0.0)), 0)
        if b_down_ptr is not None:
            c += tl.load(b_down_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)
        tl.store(slope_ptr + rows, tl.sum(dz * (z - c[None, :]), 1) / D_IN, mask=rows < n)
        if offset_ptr is not None:
            tl.store(offset_ptr + rows, tl.sum(dz * ones[None, :], 1) / D_IN, mask=rows < n)


@triton.jit
def _norm_adapter_bwd_sum_kernel(
    part_m_ptr,
    part_b_down_ptr,
    part_w_up_ptr,
    part_b_up_ptr,
    part_scale_ptr,
    w_down_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    dw_down_ptr,
    dln_weight_ptr,
    dln_bias_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    dscale_ptr,
    groups,
    scale_shares,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the groups' shares; program axis 1 picks the gradient.

    With M = sum dz xh^T and s = sum dz: dw_down = M diag(weight) + s bias^T, dln_weight_j = sum_k w_down[k,j] M[k,j],
    dln_bias = w_down^T s.
    """
    block = tl.program_id(0)
    which = tl.program_id(1)
    if which == 0 and block * BLOCK_D < D_IN:
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        dweight = tl.zeros((BLOCK_D,), tl.float32)
        dbias = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, R, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            w = load_tile(w_down_ptr, ranks, D_IN, R, cols, 1, D_IN).to(tl.float32)
            m = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            s = tl.zeros((BLOCK_R,), tl.float32)
            for p in range(0, groups):
                if part_m_ptr is not None:
                    m += load_tile(part_m_ptr + p * (R * D_IN), ranks, D_IN, R, cols, 1, D_IN)
                if part_b_down_ptr is not None:
                    s += tl.load(part_b_down_ptr + p * R + ranks, mask=ranks < R, other=0.0)
            dweight += tl.sum(w * m, 0)
            dbias += tl.sum(w * s[:, None], 0)
            if dw_down_ptr is not None:
                dw = m * parameter(ln_weight_ptr, cols, D_IN, 1.0)
                dw += s[:, None] * parameter(ln_bias_ptr, cols, D_IN, 0.0)
                store_tile(dw_down_ptr, dw, ranks, D_IN, R, cols, 1, D_IN)
            if db_down_ptr is not None:
                tl.store(db_down_ptr + ranks, s, mask=(ranks < R) & (block == 0))
        if dln_weight_ptr is not None:
            tl.store(dln_weight_ptr + cols, dweight, mask=cols < D_IN)
        if dln_bias_ptr is not None:
            tl.store(dln_bias_ptr + cols, dbias, mask=cols < D_IN)
    if part_w_up_ptr is not None and which == 1:
        sum_groups(part_w_up_ptr, dw_up_ptr, groups, D_OUT * R, block, BLOCK_P, BLOCK)
    if part_b_up_ptr is not None and which == 2:
        sum_groups(part_b_up_ptr, db_up_ptr, groups, D_OUT, block, BLOCK_P, BLOCK)
    if part_scale_ptr is not None and which == 3:
        if CHANNEL_SCALE:
            sum_groups(part_scale_ptr, dscale_ptr, scale_shares, D_OUT, block, BLOCK_P, BLOCK)
        elif block == 0:
            sum_all(part_scale_ptr, dscale_ptr, scale_shares * D_OUT, BLOCK)
