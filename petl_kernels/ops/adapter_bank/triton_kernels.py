"""Triton kernels of `adapter_bank`: one for the forward, four for the backward.

The first two are those of `bottleneck_adapter` on the rows of one sample, with the parameters of its task: a table of
addresses says where these are. Weight gradients are sums over the samples of a task, wherever in the batch they are: a
kernel orders the samples by their tasks, and the next takes pieces of that order. No atomics, and nobody waits for what
the batch holds: every program finds out for itself. See `bottleneck_adapter.triton_kernels` for what is common to all.
"""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops._triton_kernels import load_tile, store_tile
from petl_kernels.ops.bottleneck_adapter.triton_activations import activate
from petl_kernels.ops.bottleneck_adapter.triton_kernels import (
    _bottleneck_adapter_bwd_dz_kernel,
    _bottleneck_adapter_fwd_kernel,
)


@triton.jit
def _parameter(table_ptr, task, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of w_down (0), b_down (1), w_up (2) or b_up (3) of a task, for all of which `table` has a row."""
    ptr = tl.load(table_ptr + task * 4 + FIELD).to(tl.pointer_type(DTYPE))
    # An address out of memory promises nothing, and accesses would be of single elements.
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _task_of(task_ptr, TASKS, alpha):
    """The sample of this program, its task, and alpha; of a task that does not exist the first one's and NaN."""
    sample = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    task = tl.load(task_ptr + sample)
    exists = (task >= 0) & (task < TASKS)
    return sample, tl.where(exists, task, 0), tl.where(exists, tl.cast(alpha, tl.float32), float("nan"))


@triton.jit
def _adapter_bank_fwd_kernel(
    x_ptr,
    task_ptr,
    table_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    samples,
    n,
    tasks,
    stride_xm,
    stride_rm,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    B_DOWN: tl.constexpr,
    B_UP: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M of the n rows of one sample. Program axes: rows; samples, over two axes, since one ends at 65535."""
    sample, task, alpha = _task_of(task_ptr, tasks, alpha)
    if sample >= samples:
        return
    b_down_ptr = None
    b_up_ptr = None
    if B_DOWN:
        b_down_ptr = _parameter(table_ptr, task, 1, DTYPE, ALIGNED)
    if B_UP:
        b_up_ptr = _parameter(table_ptr, task, 3, DTYPE, ALIGNED)
    if residual_ptr is not None:
        residual_ptr += sample * n * stride_rm
    if z_ptr is not None:
        z_ptr += sample * n * R
    _bottleneck_adapter_fwd_kernel(
        x_ptr + sample * n * stride_xm,
        _parameter(table_ptr, task, 0, DTYPE, ALIGNED),
        b_down_ptr,
        _parameter(table_ptr, task, 2, DTYPE, ALIGNED),
        b_up_ptr,
        residual_ptr,
        None,  # no scale, gate or dropout
        None,
        None,
        y_ptr + sample * n * D_OUT,
        z_ptr,
        n,
        stride_xm,
        stride_rm,
        0,
        1.0,
        alpha,
        D_IN=D_IN,
        D_OUT=D_OUT,
        R=R,
        CHANNEL_SCALE=False,
        ACTIVATION=ACTIVATION,
        PRECISION=PRECISION,
        HELD=HELD,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        BLOCK_R=BLOCK_R,
    )


@triton.jit
def _adapter_bank_bwd_dz_kernel(
    g_ptr,
    z_ptr,
    task_ptr,
    table_ptr,
    dz_ptr,
    dx_ptr,
    samples,
    n,
    tasks,
    stride_gm,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M rows of one sample's dz; NaN if its task does not exist, as is dx, which nobody else writes then."""
    sample, task, alpha = _task_of(task_ptr, tasks, alpha)
    if sample >= samples:
        return
    _bottleneck_adapter_bwd_dz_kernel(
        g_ptr + sample * n * stride_gm,
        z_ptr + sample * n * R,
        _parameter(table_ptr, task, 2, DTYPE, ALIGNED),
        None,  # no scale, gate or dropout
        None,
        None,
        None,
        dz_ptr + sample * n * R,
        None,
        None,
        n,
        stride_gm,
        0,
        1.0,
        alpha,
        D_OUT=D_OUT,
        R=R,
        CHANNEL_SCALE=False,
        ACTIVATION=ACTIVATION,
        PRECISION=PRECISION,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        BLOCK_R=BLOCK_R,
    )
    if dx_ptr is not None:  # noqa: SIM102 (a constant, and a value)
        if alpha != alpha:
            rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            nothing = tl.full((BLOCK_M, BLOCK_D), float("nan"), tl.float32)
            for start in range(0, D_IN, BLOCK_D):
                cols = start + tl.arange(0, BLOCK_D)
                store_tile(dx_ptr + sample * n * D_IN, nothing, rows, D_IN, n, cols, 1, D_IN)


@triton.jit
def _adapter_bank_bwd_order_kernel(task_ptr, order_ptr, first_ptr, samples, tasks, BLOCK: tl.constexpr):
    """order = the samples by task, in their own order within it; first[t] = how many samples have a smaller task.

    A program finds the places of BLOCK samples, or of BLOCK tasks, by comparison with every sample.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_task = tl.program_id(1) == 1
    task = tl.load(task_ptr + mine, mask=(mine < samples) & (not is_task), other=0)
    task = tl.where(is_task, mine.to(tl.int64), task)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, samples, BLOCK):
        others = start + tl.arange(0, BLOCK)
        other = tl.load(task_ptr + others, mask=others < samples, other=0)
        before = (other[None, :] < task[:, None]) | (
            (other[None, :] == task[:, None]) & (others[None, :] < mine[:, None]) & (not is_task)
        )
        place += tl.sum((before & (others[None, :] < samples)).to(tl.int32), 1)
    if is_task:
        tl.store(first_ptr + mine, place, mask=mine <= tasks)
    else:
        tl.store(order_ptr + place, mine, mask=mine < samples)


@triton.jit
def _adapter_bank_bwd_slab_kernel(
    g_ptr,
    x_ptr,
    z_ptr,
    dz_ptr,
    table_ptr,
    trained_ptr,
    order_ptr,
    first_ptr,
    dx_ptr,
    dw_down_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    samples,
    n,
    tasks,
    piece_rows,
    stride_gm,
    stride_xm,
    alpha,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A slab of BLOCK_D channels over one piece of the rows in the order of their tasks, all of one task.

    Program axes: slab, piece, chunk of BLOCK_R ranks, as in bottleneck_adapter's, whose sums these are. Every task's
    rows are cut into pieces of `piece_rows`, of which each writes its share of the gradients, in float32.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    piece = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    ranks = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    CHUNKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    task, begun = _task_of_piece(first_ptr, piece, n, tasks, piece_rows, BLOCK_T)
    if task >= tasks:
        return
    trains = True
    if trained_ptr is not None:
        trains = tl.load(trained_ptr + task) >= 0
    first = tl.load(first_ptr + task).to(tl.int64) * n
    begin = first + (piece - begun) * piece_rows
    end = tl.minimum(begin + piece_rows, tl.load(first_ptr + task + 1).to(tl.int64) * n)
    total = tl.cast(samples, tl.int64) * n
    WANT_DZ: tl.constexpr = dx_ptr is not None or dw_down_ptr is not None or db_down_ptr is not None
    WANT_G: tl.constexpr = dw_up_ptr is not None or db_up_ptr is not None or (ADD_G and dx_ptr is not None)

    dw_down = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dw_up = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    db_down = tl.zeros((BLOCK_R,), tl.float32)
    db_up = tl.zeros((BLOCK_D,), tl.float32)
    if dx_ptr is not None:
        w_down_ptr = _parameter(table_ptr, task, 0, DTYPE, ALIGNED)
        if CHUNKS == 1:
            w_down = load_tile(w_down_ptr, ranks, D_IN, R, cols, 1, D_IN).to(dz_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        inside = places < end
        rows = tl.load(order_ptr + places // n, mask=inside, other=0).to(tl.int64) * n + places % n
        rows = tl.where(inside, rows, total)
        if WANT_G:
            g = load_tile(g_ptr, rows, stride_gm, total, cols, 1, D_OUT)
        if dw_up_ptr is not None:
            z = load_tile(z_ptr, rows, R, total, ranks, 1, R)
            h = activate(z.to(tl.float32), ACTIVATION).to(z.dtype)
            dw_up = tl.dot(tl.trans(h), g.to(z.dtype), dw_up, input_precision=PRECISION)
        if db_up_ptr is not None:
            db_up += tl.sum(g.to(tl.float32), 0)
        if WANT_DZ:
            dz = load_tile(dz_ptr, rows, R, total, ranks, 1, R)
        if db_down_ptr is not None:
            db_down += tl.sum(dz.to(tl.float32), 0)
        if dw_down_ptr is not None:
            x = load_tile(x_ptr, rows, stride_xm, total, cols, 1, D_IN)
            dw_down = tl.dot(tl.trans(dz), x, dw_down, input_precision=PRECISION)
        if dx_ptr is not None and chunk == 0:
            if CHUNKS == 1:
                dx = tl.dot(dz, w_down, input_precision=PRECISION)
            else:
                dx = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                for k in range(0, R, BLOCK_R):
                    every = k + tl.arange(0, BLOCK_R)
                    dz_k = load_tile(dz_ptr, rows, R, total, every, 1, R)
                    w_k = load_tile(w_down_ptr, every, D_IN, R, cols, 1, D_IN).to(dz_k.dtype)
                    dx = tl.dot(dz_k, w_k, dx, input_precision=PRECISION)
            if ADD_G:
                dx += g.to(tl.float32)
            store_tile(dx_ptr, dx, rows, D_IN, total, cols, 1, D_IN)

    if trains:
        s = tl.cast(alpha, tl.float32)
        if dw_down_ptr is not None:
            store_tile(dw_down_ptr + piece * (R * D_IN), dw_down, ranks, D_IN, R, cols, 1, D_IN)
        if db_down_ptr is not None:
            tl.store(db_down_ptr + piece * R + ranks, db_down, mask=(ranks < R) & (tl.program_id(0) == 0))
        if dw_up_ptr is not None:
            store_tile(dw_up_ptr + piece * (D_OUT * R), dw_up * s, ranks, 1, R, cols, R, D_OUT)
        if db_up_ptr is not None:
            tl.store(db_up_ptr + piece * D_OUT + cols, db_up * s, mask=(cols < D_OUT) & (chunk == 0))


@triton.jit
def _pieces(first_ptr, t, n, tasks, piece_rows):
    """How many pieces the tasks `t` have, and 0 for those past the last."""
    rows = tl.load(first_ptr + t + 1, mask=t < tasks, other=0) - tl.load(first_ptr + t, mask=t < tasks, other=0)
    return (rows.to(tl.int64) * n + piece_rows - 1) // piece_rows


@triton.jit
def _task_of_piece(first_ptr, piece, n, tasks, piece_rows, BLOCK_T: tl.constexpr):
    """The task of a piece (`tasks` where there is no such piece), and the first piece of that task."""
    t = tl.arange(0, BLOCK_T)
    pieces = _pieces(first_ptr, t, n, tasks, piece_rows)
    ends = tl.cumsum(pieces, 0)
    task = tl.sum(((ends <= piece) & (t < tasks)).to(tl.int32), 0)
    return task, tl.sum(tl.where(t < task, pieces, 0), 0)


@triton.jit
def _sum_pieces(part_ptr, out_ptr, begun, count, entry, size, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out[entry, i] = the sum over a task's pieces of part[piece, i] for one block of i, always in the same order."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (p[:, None] < count) & (offsets[None, :] < size)
        total += tl.sum(tl.load(part_ptr + (begun + p[:, None]) * size + offsets[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + entry.to(tl.int64) * size + offsets, total, mask=offsets < size)


@triton.jit
def _adapter_bank_bwd_sum_kernel(
    part_w_down_ptr,
    part_b_down_ptr,
    part_w_up_ptr,
    part_b_up_ptr,
    trained_ptr,
    first_ptr,
    dw_down_ptr,
    db_down_ptr,
    dw_up_ptr,
    db_up_ptr,
    n,
    tasks,
    piece_rows,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum each task's pieces, none being zero; program axes: block of elements, gradient, task."""
    block = tl.program_id(0)
    which = tl.program_id(1)
    task = tl.program_id(2)
    entry = task
    if trained_ptr is not None:
        entry = tl.load(trained_ptr + task).to(tl.int32)
        if entry < 0:
            return
    t = tl.arange(0, BLOCK_T)
    pieces = _pieces(first_ptr, t, n, tasks, piece_rows)
    begun = tl.sum(tl.where(t < task, pieces, 0), 0)
    count = tl.sum(tl.where(t == task, pieces, 0), 0)
    if part_w_down_ptr is not None and which == 0:
        _sum_pieces(part_w_down_ptr, dw_down_ptr, begun, count, entry, R * D_IN, block, BLOCK_P, BLOCK)
    if part_w_up_ptr is not None and which == 1:
        _sum_pieces(part_w_up_ptr, dw_up_ptr, begun, count, entry, D_OUT * R, block, BLOCK_P, BLOCK)
    if part_b_down_ptr is not None and which == 2:
        _sum_pieces(part_b_down_ptr, db_down_ptr, begun, count, entry, R, block, BLOCK_P, BLOCK)
    if part_b_up_ptr is not None and which == 3:
        _sum_pieces(part_b_up_ptr, db_up_ptr, begun, count, entry, D_OUT, block, BLOCK_P, BLOCK)
