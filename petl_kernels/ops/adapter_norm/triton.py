"""Triton implementation of `adapter_norm`: launch settings and entry points over `triton_kernels`.

One launch forward. Two or three backward: du, dz and the norm's gradients by rows; dx and the adapter's gradients by
slabs of channels, with the bottleneck's kernel; then, of more than one share of a gradient, their sum in a fixed order.
No atomics: results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, dense, rows, warps, workspace
from petl_kernels.ops.adapter_norm import triton_kernels as kernels
from petl_kernels.ops.bottleneck_adapter import triton as bottleneck

_MAX_RANK = 128
_SUM_BLOCK = 512


def _settings(d: int, r: int, itemsize: int, backward: bool, device: Device) -> dict[str, int]:
    """Sixteen rows, the least that `tl.dot` takes, and all their columns held where registers allow it.

    The bounds are where the kernels, compiled for four architectures, begin to spill registers; products of float32
    operands leave none for a row. A narrow bottleneck is padded to 64 ranks: with fewer columns than the warps can
    share out each of them would hold a copy.
    """
    half, nvidia = itemsize == 2, device.warp_size == 32
    block_r = max(64 if half else 16, block(_MAX_RANK, r))
    held = half and d <= (1024 if not backward else 768 if nvidia else 512)
    wide = (
        held and (d > 768 or (backward and nvidia)) and block_r <= 64
    )  # fewer slabs to unroll, and on sm_100 no spill
    width = block(128 if wide else 64 if half else max(32, min(64, 2048 // block_r)), d)
    return dict(
        SLABS=triton.cdiv(d, width) if held else 0,
        HELD=held,
        BLOCK_M=16,
        BLOCK_D=width,
        BLOCK_R=block_r,
        num_warps=warps(8, device),
        num_stages=2 if nvidia and (half or not backward) else 1,  # a second stage passes gfx942's 64 KiB
    )


def unsupported(
    x: Tensor,
    residual: Tensor | None,
    hidden: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    *_: Any,
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if w_down.shape[0] > _MAX_RANK:
        return f"its bottleneck is at most {_MAX_RANK} wide, got r = {w_down.shape[0]}"
    return _triton.cannot_run(x, w_down)


def forward(
    x: Tensor,
    residual: Tensor | None,
    hidden: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    eps: float,
    save: bool,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and z and the statistics (empty unless `save`); schema in the op's `__init__`."""
    (r, d_in), d = w_down.shape, w_up.shape[0]
    y = (x if hidden is None else hidden).new_empty((*x.shape[:-1], d))
    z = x.new_empty((*x.shape[:-1], r) if save else (0,))
    n = y.numel() // d
    mean, rstd = new_statistics(x, n if save else 0, norm)
    if store:
        raise NotImplementedError("these kernels form the sum again")
    if n == 0:
        return y, z, mean, rstd, y.new_empty((0,))
    x, stride_xm = rows(x)
    residual, stride_rm = (None, 0) if residual is None else rows(residual)
    hidden, stride_hm = (None, 0) if hidden is None else rows(hidden)
    settings = _settings(d, r, x.element_size(), False, _triton.device_of(x.device))
    with torch.cuda.device_of(x):
        kernels._adapter_norm_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            residual,
            hidden,
            w_down.contiguous(),
            dense(b_down),
            w_up.contiguous(),
            dense(b_up),
            dense(ln_weight),
            dense(ln_bias),
            dense(scale),
            y,
            z if save else None,
            mean if mean.numel() else None,
            rstd if save else None,
            n,
            stride_xm,
            stride_rm,
            stride_hm,
            float(alpha),
            float(eps),
            D_IN=d_in,
            D=d,
            R=r,
            RMS=norm == "rms",
            CHANNEL_SCALE=scale is not None and scale.numel() > 1,
            ACTIVATION=activation,
            PRECISION=_triton.precision(),
            **settings,
        )
    return y, z, mean, rstd, y.new_empty((0,))


def backward(
    g: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    hidden: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normal: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, the sum, w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale); empty where not needed."""
    (r, d_in), d = w_down.shape, w_up.shape[0]
    n = g.numel() // d
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    dsum = g.new_empty(g.shape if needs[1] else (0,))
    grads = new_gradients((w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale), needs[2:], z)
    if n == 0:
        return dx, dsum, *(grad.zero_() for grad in grads)
    g, stride_gm = rows(g)
    term, stride_tm = rows(x if add_g else hidden)  # type: ignore[arg-type]
    residual, stride_rm = (None, 0) if residual is None else rows(residual)
    x, stride_xm = rows(x) if x is not None and needs[2] else (None, 0)
    w_down, w_up, b_up, scale = w_down.contiguous(), w_up.contiguous(), dense(b_up), dense(scale)
    device, itemsize, alpha = _triton.device_of(g.device), z.element_size(), float(alpha)
    channel = scale is not None and scale.numel() > 1
    adapter_needs = (*needs[2:6], needs[8])
    of_slabs = needs[0] or any(adapter_needs)
    du = dsum if needs[1] else g.new_empty(g.shape) if of_slabs else None
    dz = torch.empty_like(z) if needs[0] or needs[2] or needs[3] else None
    settings = _settings(d, r, itemsize, True, device)
    tiles = triton.cdiv(n, settings["BLOCK_M"])
    by_slabs = bottleneck._slab_settings(max(d_in, d), r, itemsize, device)
    chunks = triton.cdiv(r, by_slabs["BLOCK_R"])
    slab_groups = bottleneck._row_groups(n, max(d_in, d), r, any(adapter_needs), device, by_slabs)
    shares = (*(slab_groups,) * 4, slab_groups * chunks, tiles, tiles)
    ordered = [*grads[:4], grads[6], *grads[4:6]]
    targets, parts = _targets(ordered, (*adapter_needs, *needs[6:8]), shares, d, scale is not None and not channel)
    sizes: dict[str, Any] = dict(R=r, CHANNEL_SCALE=channel)
    common: dict[str, Any] = dict(sizes, ACTIVATION=activation, PRECISION=_triton.precision())
    with torch.cuda.device_of(g):
        kernels._adapter_norm_bwd_row_kernel[(tiles,)](
            g,
            term,
            residual,
            z,
            mean if mean.numel() else None,
            rstd,
            w_up,
            b_up,
            dense(ln_weight),
            scale,
            du,
            dz,
            *targets[5:],
            n,
            stride_gm,
            stride_tm,
            stride_rm,
            alpha,
            D=d,
            RMS=norm == "rms",
            # g beside the rows it belongs to; where weights are float32 their tiles leave no room (16 bytes spilled).
            HOLD_G=w_up.dtype == z.dtype,
            **common,
            **settings,
        )
        if of_slabs:
            grid = (triton.cdiv(max(d_in, d), by_slabs["BLOCK_D"]), slab_groups, chunks)
            bottleneck.kernels._bottleneck_adapter_bwd_slab_kernel[grid](
                du,
                x,
                z,
                dz,
                w_down,
                w_up,
                b_up,
                scale,
                *(None,) * 6,  # neither gate nor norm before the branch
                dx if needs[0] else None,
                *targets[:5],
                n,
                d,
                stride_xm,
                alpha,
                D_IN=d_in,
                D_OUT=d,
                ADD_G=add_g,
                **common,
                **by_slabs,
            )
        if any(part is not None for part in parts):
            longest = max(8 * d, *(grad.numel() for part, grad in zip(parts, ordered) if part is not None))
            kernels._adapter_norm_bwd_sum_kernel[(triton.cdiv(longest, _SUM_BLOCK), 7)](
                *parts, *ordered, slab_groups, shares[4], tiles, D_IN=d_in, D=d, BLOCK_P=8, BLOCK=_SUM_BLOCK, **sizes
            )
    return dx, dsum, *grads


def _targets(
    grads: Sequence[Tensor], needs: Sequence[bool], shares: Sequence[int], d: int, scalar_scale: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where the kernels write each gradient, in the order of `grads`, and which of these are partial sums.

    A gradient of one share is written in place. That of a scalar scale has d values per share, still to be summed.
    """
    summed = [need and count > 1 for need, count in zip(needs, shares)]
    lengths = [grad.numel() * count for grad, count in zip(grads, shares)]
    if needs[4] and scalar_scale:
        summed[4], lengths[4] = True, d * shares[4]
    if not any(summed):
        return [grad if need else None for grad, need in zip(grads, needs)], [None] * len(grads)
    scratch = workspace([length if partial else 0 for length, partial in zip(lengths, summed)], grads[0])
    parts = [part if partial else None for part, partial in zip(scratch, summed)]
    return [p if p is not None else grad if need else None for p, grad, need in zip(parts, grads, needs)], parts
