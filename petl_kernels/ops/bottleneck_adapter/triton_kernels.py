"""Triton kernels of `bottleneck_adapter`: one for the forward, three for the backward.

Common to all: N rows and the row strides are run-time values (a new batch size compiles nothing), the widths are
constants; row offsets are int64; what lies outside a matrix is read as zero, so that any r and d do; matrix products
take operands in x's dtype and accumulate in float32; an optional tensor that is absent is passed as None, which
removes its code. No accumulator is the target of two `tl.dot` in one loop, which miscompiles on Blackwell.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import keep, load_of_rows, load_tile, store_tile, sum_adapter
from petl_kernels.ops.bottleneck_adapter.triton_activations import activate, activate_grad, softmax, softmax_grad


@triton.jit
def _up_slab(
    h,
    w,
    cols,
    D_OUT: tl.constexpr,
    b_up_ptr,
    gate,
    scale_ptr,
    alpha,
    CHANNEL_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale * (h w_up^T + gate b_up) for the output channels `cols`; w is their [BLOCK_R, BLOCK_D] tile of w_up^T."""
    y = tl.dot(h, w.to(h.dtype), input_precision=PRECISION)
    if b_up_ptr is not None:
        b_up = tl.load(b_up_ptr + cols, mask=cols < D_OUT, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            b_up = gate[:, None] * b_up
        y += b_up
    if CHANNEL_SCALE:
        y *= tl.load(scale_ptr + cols, mask=cols < D_OUT, other=0.0).to(tl.float32)[None, :]
    elif scale_ptr is not None:
        y *= tl.load(scale_ptr).to(tl.float32)
    return y * tl.cast(alpha, tl.float32)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_adapter_fwd_kernel(
    x_ptr,
    w_down_ptr,
    b_down_ptr,
    w_up_ptr,
    b_up_ptr,
    residual_ptr,
    scale_ptr,
    gate_ptr,
    seed_ptr,
    y_ptr,
    z_ptr,
    n,
    stride_xm,
    stride_rm,
    threshold,
    factor,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of y and z.

    HELD, for the sequential residual: as many of x's slabs of BLOCK_D columns stay in registers between the passes.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty

    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    x_tiles = ()
    if HELD > 0:
        for i in tl.static_range(HELD):
            x = load_tile(x_ptr, rows, stride_xm, n, cols + i * BLOCK_D, 1, D_IN)
            x_tiles = x_tiles + (x,)  # noqa: RUF005 (Triton compiles no starred expression)
        # An unrolled loop is not pipelined by the compiler: the next weights are asked for before the product.
        w = load_tile(w_down_ptr, cols, 1, D_IN, ranks, D_IN, R)
        for i in tl.static_range(HELD):
            ahead = w
            if i + 1 < HELD:
                ahead = load_tile(w_down_ptr, cols + (i + 1) * BLOCK_D, 1, D_IN, ranks, D_IN, R)
            z = tl.dot(x_tiles[i], w.to(dtype), z, input_precision=PRECISION)
            w = ahead
    for start in range(HELD * BLOCK_D, D_IN, BLOCK_D):
        x = load_tile(x_ptr, rows, stride_xm, n, start + cols, 1, D_IN)
        w = load_tile(w_down_ptr, start + cols, 1, D_IN, ranks, D_IN, R)
        z = tl.dot(x, w.to(dtype), z, input_precision=PRECISION)
    if b_down_ptr is not None:
        z += tl.load(b_down_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "softmax":
        z = softmax(z, ranks, R)
    if z_ptr is not None:
        store_tile(z_ptr, z, rows, R, n, ranks, 1, R)
    h = activate(z, ACTIVATION)
    if seed_ptr is not None:
        kept = keep(seed_ptr, tl.program_id(0), ranks, threshold, BLOCK_M, BLOCK_R)
        h = tl.where(kept, h * tl.cast(factor, tl.float32), 0.0)
    gate = None
    if gate_ptr is not None:
        gate = load_of_rows(gate_ptr, rows, n)
        h *= gate[:, None]
    # Padding ranks must be zero: an infinite x times their zero weights is NaN, and would stay one in the sum.
    h = tl.where(ranks[None, :] < R, h, 0.0).to(dtype)

    if HELD > 0:
        w = load_tile(w_up_ptr, ranks, 1, R, cols, R, D_OUT)
        for i in tl.static_range(HELD):
            ahead = w
            if i + 1 < HELD:
                ahead = load_tile(w_up_ptr, ranks, 1, R, cols + (i + 1) * BLOCK_D, R, D_OUT)
            out = cols + i * BLOCK_D
            y = _up_slab(h, w, out, D_OUT, b_up_ptr, gate, scale_ptr, alpha, CHANNEL_SCALE, PRECISION)
            store_tile(y_ptr, y + x_tiles[i].to(tl.float32), rows, D_OUT, n, out, 1, D_OUT)
            w = ahead
    for start in range(HELD * BLOCK_D, D_OUT, BLOCK_D):
        out = start + cols
        w = load_tile(w_up_ptr, ranks, 1, R, out, R, D_OUT)
        y = _up_slab(h, w, out, D_OUT, b_up_ptr, gate, scale_ptr, alpha, CHANNEL_SCALE, PRECISION)
        if residual_ptr is not None:
            y += load_tile(residual_ptr, rows, stride_rm, n, out, 1, D_OUT).to(tl.float32)
        store_tile(y_ptr, y, rows, D_OUT, n, out, 1, D_OUT)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_adapter_bwd_dz_kernel(
    g_ptr,
    z_ptr,
    w_up_ptr,
    b_up_ptr,
    scale_ptr,
    gate_ptr,
    seed_ptr,
    dz_ptr,
    h_ptr,
    dgate_ptr,
    n,
    stride_gm,
    threshold,
    factor,
    alpha,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of dz = gate drop((s g) w_up) * act'(z), of h = gate drop(act(z)) and of the gate's gradient.

    Each unless its pointer is None. h is written for what follows only where it is more than an activation of z: a
    program there per slab of channels would draw the random numbers again.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    dtype = z_ptr.dtype.element_ty

    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dgate = tl.zeros((BLOCK_M,), tl.float32)
    if dz_ptr is not None or dgate_ptr is not None:
        for start in range(0, D_OUT, BLOCK_D):
            g = load_tile(g_ptr, rows, stride_gm, n, start + cols, 1, D_OUT)
            if CHANNEL_SCALE:
                s = tl.load(scale_ptr + start + cols, mask=start + cols < D_OUT, other=0.0)
                g = g.to(tl.float32) * s.to(tl.float32)[None, :]
            if dgate_ptr is not None and b_up_ptr is not None:
                b_up = tl.load(b_up_ptr + start + cols, mask=start + cols < D_OUT, other=0.0)
                dgate += tl.sum(g.to(tl.float32) * b_up.to(tl.float32)[None, :], 1)
            w = load_tile(w_up_ptr, start + cols, R, D_OUT, ranks, 1, R)
            dh = tl.dot(g.to(dtype), w.to(dtype), dh, input_precision=PRECISION)
    s = tl.cast(alpha, tl.float32)
    if not CHANNEL_SCALE and scale_ptr is not None:
        s *= tl.load(scale_ptr).to(tl.float32)
    dh *= s

    z = load_tile(z_ptr, rows, R, n, ranks, 1, R).to(tl.float32)
    if seed_ptr is not None:
        kept = keep(seed_ptr, tl.program_id(0), ranks, threshold, BLOCK_M, BLOCK_R)
        dh = tl.where(kept, dh * tl.cast(factor, tl.float32), 0.0)
    if dgate_ptr is not None:
        own = tl.sum(tl.where(ranks[None, :] < R, activate(z, ACTIVATION) * dh, 0.0), 1)
        tl.store(dgate_ptr + rows, own + s * dgate, mask=rows < n)
    if gate_ptr is not None:
        gate = load_of_rows(gate_ptr, rows, n)[:, None]
        dh *= gate
    if h_ptr is not None:
        h = activate(z, ACTIVATION)
        if seed_ptr is not None:
            h = tl.where(kept, h * tl.cast(factor, tl.float32), 0.0)
        if gate_ptr is not None:
            h *= gate
        store_tile(h_ptr, h, rows, R, n, ranks, 1, R)
    if dz_ptr is not None:
        dz = softmax_grad(dh, z, ranks, R) if ACTIVATION == "softmax" else activate_grad(dh, z, ACTIVATION)
        store_tile(dz_ptr, dz, rows, R, n, ranks, 1, R)


@triton.jit
def _bottleneck_adapter_bwd_slab_kernel(
    g_ptr,
    x_ptr,
    z_ptr,
    dz_ptr,
    w_down_ptr,
    w_up_ptr,
    b_up_ptr,
    scale_ptr,
    gate_ptr,
    mean_ptr,
    rstd_ptr,
    offset_ptr,
    slope_ptr,
    ln_weight_ptr,
    dx_ptr,
    dw_down_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    dscale_ptr,
    n,
    stride_gm,
    stride_xm,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A slab of BLOCK_D channels over one group of rows: dx, and the group's share of every parameter's gradient.

    Program axes: slab, group, chunk of BLOCK_R ranks (a wide bottleneck's accumulators do not fit the registers; dx,
    the sum over all ranks, is left to chunk 0). A gradient's pointer is None when not asked for. The shares of group
    p are written at p times the gradient's size: into workspace, or, of a single group, into the gradients themselves.
    h is act(z); dropout and gate are in it already where there are any, and z is then h.

    With rstd the branch read norm(x) (`norm_adapter`): x stands for xh = (x - mean) rstd here, also in dw_down, and
    dx = rstd (dz w_down ln_weight - offset - xh slope), where offset, like mean, is absent of RMSNorm.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    chunk = tl.program_id(2)
    ranks = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    CHUNKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    WANT_UP: tl.constexpr = dw_up_ptr is not None or dscale_ptr is not None
    WANT_DB_UP: tl.constexpr = db_up_ptr is not None or (dscale_ptr is not None and b_up_ptr is not None)
    WANT_DZ: tl.constexpr = dx_ptr is not None or dw_down_ptr is not None or db_down_ptr is not None
    WANT_X: tl.constexpr = dw_down_ptr is not None or (dx_ptr is not None and rstd_ptr is not None)
    WANT_G: tl.constexpr = WANT_UP or WANT_DB_UP or (ADD_G and dx_ptr is not None)

    dw_down = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dw_up = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)  # M = g^T h, transposed; the scale is applied at the end
    db_down = tl.zeros((BLOCK_R,), tl.float32)
    db_up = tl.zeros((BLOCK_D,), tl.float32)
    if dx_ptr is not None and CHUNKS == 1:
        w_down = load_tile(w_down_ptr, ranks, D_IN, R, cols, 1, D_IN).to(dz_ptr.dtype.element_ty)

    # Groups interleave and walk backward: what the kernel before read last of g is read first, from the L2 cache.
    blocks = tl.cdiv(n, BLOCK_M)
    for i in range(group, blocks, groups):
        rows = (blocks - 1 - i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        if WANT_G:
            g = load_tile(g_ptr, rows, stride_gm, n, cols, 1, D_OUT)
        if WANT_UP:
            z = load_tile(z_ptr, rows, R, n, ranks, 1, R)
            h = activate(z.to(tl.float32), ACTIVATION).to(z.dtype)
            dw_up = tl.dot(tl.trans(h), g.to(z.dtype), dw_up, input_precision=PRECISION)
        if WANT_DB_UP:
            if gate_ptr is None:
                db_up += tl.sum(g.to(tl.float32), 0)
            else:
                db_up += tl.sum(g.to(tl.float32) * load_of_rows(gate_ptr, rows, n)[:, None], 0)
        if WANT_DZ:
            dz = load_tile(dz_ptr, rows, R, n, ranks, 1, R)
        if db_down_ptr is not None:
            db_down += tl.sum(dz.to(tl.float32), 0)
        if WANT_X:
            x = load_tile(x_ptr, rows, stride_xm, n, cols, 1, D_IN)
            if rstd_ptr is not None:
                normal = x.to(tl.float32)
                if mean_ptr is not None:
                    normal -= load_of_rows(mean_ptr, rows, n)[:, None]
                rstd = load_of_rows(rstd_ptr, rows, n)[:, None]
                normal = tl.where(cols[None, :] < D_IN, normal * rstd, 0.0)
                x = normal.to(x.dtype)
        if dw_down_ptr is not None:
            dw_down = tl.dot(tl.trans(dz), x, dw_down, input_precision=PRECISION)
        if dx_ptr is not None and chunk == 0:
            if CHUNKS == 1:
                dx = tl.dot(dz, w_down, input_precision=PRECISION)
            else:
                dx = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                for k in range(0, R, BLOCK_R):
                    every = k + tl.arange(0, BLOCK_R)
                    dz_k = load_tile(dz_ptr, rows, R, n, every, 1, R)
                    w_k = load_tile(w_down_ptr, every, D_IN, R, cols, 1, D_IN).to(dz_k.dtype)
                    dx = tl.dot(dz_k, w_k, dx, input_precision=PRECISION)
            if rstd_ptr is not None:
                if ln_weight_ptr is not None:
                    weight = tl.load(ln_weight_ptr + cols, mask=cols < D_IN, other=0.0)
                    dx *= weight.to(tl.float32)[None, :]
                if offset_ptr is not None:
                    dx -= load_of_rows(offset_ptr, rows, n)[:, None]
                dx = (dx - normal * load_of_rows(slope_ptr, rows, n)[:, None]) * rstd
            if ADD_G:
                dx += g.to(tl.float32)
            store_tile(dx_ptr, dx, rows, D_IN, n, cols, 1, D_IN)

    if dw_down_ptr is not None:
        store_tile(dw_down_ptr + group * (R * D_IN), dw_down, ranks, D_IN, R, cols, 1, D_IN)
    if db_down_ptr is not None:
        tl.store(db_down_ptr + group * R + ranks, db_down, mask=(ranks < R) & (tl.program_id(0) == 0))
    in_up = cols < D_OUT
    if dscale_ptr is not None:
        w_up = load_tile(w_up_ptr, ranks, 1, R, cols, R, D_OUT).to(tl.float32)
        dscale = tl.sum(tl.where(ranks[:, None] < R, w_up * dw_up, 0.0), 0)
        if b_up_ptr is not None:
            b_up = tl.load(b_up_ptr + cols, mask=in_up & (chunk == 0), other=0.0)
            dscale += b_up.to(tl.float32) * db_up
        tl.store(dscale_ptr + (group * CHUNKS + chunk) * D_OUT + cols, dscale, mask=in_up)
    s = tl.zeros((BLOCK_D,), tl.float32) + tl.cast(alpha, tl.float32)
    if CHANNEL_SCALE:
        s *= tl.load(scale_ptr + cols, mask=in_up, other=0.0).to(tl.float32)
    elif scale_ptr is not None:
        s *= tl.load(scale_ptr).to(tl.float32)
    if dw_up_ptr is not None:
        store_tile(dw_up_ptr + group * (D_OUT * R), dw_up * s[None, :], ranks, 1, R, cols, R, D_OUT)
    if db_up_ptr is not None:
        tl.store(db_up_ptr + group * D_OUT + cols, db_up * s, mask=in_up & (chunk == 0))


@triton.jit
def _bottleneck_adapter_bwd_sum_kernel(
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
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the groups' shares; program axis 1 picks the gradient."""
    block = tl.program_id(0)
    which = tl.program_id(1)
    sum_adapter(
        part_w_down_ptr, part_b_down_ptr, part_w_up_ptr, part_b_up_ptr, part_scale_ptr,
        dw_down_ptr, db_down_ptr, dw_up_ptr, db_up_ptr, dscale_ptr,
        groups, scale_shares, which, block, D_IN, D_OUT, R, CHANNEL_SCALE, BLOCK_P, BLOCK,
    )  # fmt: skip
