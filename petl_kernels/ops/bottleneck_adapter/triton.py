"""Triton implementation of `bottleneck_adapter`: launch settings and entry points over `triton_kernels`.

One launch forward, two or three backward: dz (and h, where there is dropout or a gate) by rows, then dx and the
parameters' gradients by slabs of channels, then, of more than one group of rows, the sum over the groups in a fixed
order. No atomics: results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._dropout import threshold
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, dense, rows, warps, workspace
from petl_kernels.ops.bottleneck_adapter import triton_kernels as kernels

_MAX_RANK = 512
_SUM_BLOCK = 512

# Launch settings. The bounds on tiles are where the kernels, compiled for sm_80, sm_90, sm_100 and gfx942, begin to
# spill registers or pass the shared memory; tests/test_triton_compile.py compiles them all.


def _modified(gate: Tensor | None, seed: Tensor | None, activation: str) -> bool:
    """Whether more than an activation happens to a tile of the bottleneck, which takes registers of its own."""
    return gate is not None or seed is not None or activation == "softmax"


def _row_settings(n: int, d: int, r: int, itemsize: int, device: Device, modified: bool = False) -> dict[str, int]:
    """Tiles of the kernels that walk rows: as many rows as still give every processor a program."""
    half = itemsize == 2
    block_r = block(_MAX_RANK, r)
    most = max(16, min(32 if modified else 64, (8192 if half else 2048) // block_r))
    fill = n // device.processors
    width = max(16, min(64, (8192 if half else 4096) // block_r))
    full = modified and block_r == _MAX_RANK  # the registers, as they are with 64 rows of anything modified
    return dict(
        BLOCK_M=min(most, 64 if fill >= 64 else 32 if fill >= 32 else 16),
        BLOCK_D=block(width, d),
        BLOCK_R=block_r,
        num_warps=warps(8, device),
        num_stages=3 if half and device.warp_size == 32 and not full else 2,  # a third stage passes gfx942's 64 KiB
    )


def _held_slabs(d: int, itemsize: int, settings: dict[str, int], modified: bool = False) -> int:
    """How many of x's slabs of 128 columns stay in registers for the whole forward: 96 KiB of a processor's 256.

    Held, they are read once; the others are read again, from the L2 cache, for the residual. Products of float32
    operands leave no registers for them, what else happens to the bottleneck half as many.
    """
    if itemsize != 2 or settings["BLOCK_R"] > 64:
        return 0
    width = block(128, d)
    room = (48 if modified else 96) * 1024 // (settings["BLOCK_M"] * itemsize * width)
    return min(triton.cdiv(d, width), 8, room)


def _slab_settings(d: int, r: int, itemsize: int, device: Device) -> dict[str, int]:
    """Tiles of the kernel that walks slabs of channels; two float32 accumulators of BLOCK_R x BLOCK_D stay in it.

    As wide as they allow: every slab reads z and dz again, 2 r / BLOCK_D passes over N x d.
    """
    block_r = block(64, r)
    height, width = (16, 64) if itemsize == 4 else (32, 8192 // max(block_r, 32))
    return dict(BLOCK_M=height, BLOCK_D=block(width, d), BLOCK_R=block_r, num_warps=warps(8, device), num_stages=2)


def _row_groups(n: int, d: int, r: int, partials: bool, device: Device, settings: dict[str, int]) -> int:
    """Groups of rows: enough to fill the device, each of at least 4 r rows where it leaves partial sums behind."""
    programs = triton.cdiv(d, settings["BLOCK_D"]) * triton.cdiv(r, settings["BLOCK_R"])
    least = 4 * max(r, 16) if partials else settings["BLOCK_M"]
    return max(1, min(triton.cdiv(device.processors, programs) if partials else 65535, n // least))


def unsupported(x: Tensor, w_down: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if w_down.shape[0] > _MAX_RANK:
        return f"its bottleneck is at most {_MAX_RANK} wide, got r = {w_down.shape[0]}"
    return _triton.cannot_run(x, w_down)


def forward(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    alpha: float,
    activation: str,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., d_out] and z [..., r] (empty unless `save_z`); shapes and dtypes as in the op's schema."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], d_out), dtype=dtype)
    z = x.new_empty((*x.shape[:-1], r) if save_z else (0,))
    n = y.numel() // d_out
    if n == 0:
        return y, z
    sequential = residual is x
    x, stride_xm = rows(x)
    device = _triton.device_of(x.device)
    modified = _modified(gate, seed, activation)
    settings = _row_settings(n, d_in, r, x.element_size(), device, modified)
    held = _held_slabs(d_in, x.element_size(), settings, modified) if sequential else 0
    if held:
        settings["BLOCK_D"] = block(128, d_in)  # fewer unrolled slabs
    if sequential:
        residual, stride_rm = x, stride_xm
    else:
        residual, stride_rm = (None, 0) if residual is None else rows(residual)
    with torch.cuda.device_of(x):
        kernels._bottleneck_adapter_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            w_down.contiguous(),
            dense(b_down),
            w_up.contiguous(),
            dense(b_up),
            residual,
            dense(scale),
            dense(gate),
            seed,
            y,
            z if save_z else None,
            n,
            stride_xm,
            stride_rm,
            threshold(dropout),
            1 / (1 - dropout),
            float(alpha),
            D_IN=d_in,
            D_OUT=d_out,
            R=r,
            CHANNEL_SCALE=scale is not None and scale.numel() > 1,
            ACTIVATION=activation,
            PRECISION=_triton.precision(),
            HELD=held,
            **settings,
        )
    return y, z


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    alpha: float,
    activation: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, w_down, b_down, w_up, b_up, scale, gate); an empty tensor for each that is not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    n, d = g.numel() // d_out, max(d_in, d_out)
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    *grads, dgate = new_gradients((w_down, b_down, w_up, b_up, scale, gate), needs[1:], z)
    needs_slabs = needs[1:6]
    g, stride_gm = rows(g)
    x, stride_xm = rows(x) if x is not None and needs[1] else (None, 0)
    w_down, w_up, b_up, scale, gate = w_down.contiguous(), w_up.contiguous(), dense(b_up), dense(scale), dense(gate)
    device, itemsize, alpha = _triton.device_of(g.device), z.element_size(), float(alpha)
    by_slabs = _slab_settings(d, r, itemsize, device)
    chunks = triton.cdiv(r, by_slabs["BLOCK_R"])
    groups = _row_groups(n, d, r, any(needs_slabs), device, by_slabs)
    channel = scale is not None and scale.numel() > 1
    shares = (groups,) * 4 + (groups * chunks,)
    targets, parts = _targets(grads, needs_slabs, shares, d_out, scalar_scale=scale is not None and not channel)
    sizes: dict[str, Any] = dict(D_OUT=d_out, R=r, CHANNEL_SCALE=channel)
    common: dict[str, Any] = dict(sizes, PRECISION=_triton.precision())
    with torch.cuda.device_of(g):
        dz = torch.empty_like(z) if any(needs[:3]) else None
        # An activation is cheaper to compute again than to store; random numbers are not.
        h = torch.empty_like(z) if (gate is not None or seed is not None) and (needs[3] or needs[5]) else None
        if n > 0 and (dz is not None or h is not None or needs[6]):
            by_rows = _row_settings(n, d_out, r, itemsize, device, _modified(gate, seed, activation))
            kernels._bottleneck_adapter_bwd_dz_kernel[(triton.cdiv(n, by_rows["BLOCK_M"]),)](
                g,
                z,
                w_up,
                b_up if needs[6] else None,
                scale,
                gate,
                seed,
                dz,
                h,
                dgate if needs[6] else None,
                n,
                stride_gm,
                threshold(dropout),
                1 / (1 - dropout),
                alpha,
                ACTIVATION=activation,
                **common,
                **by_rows,
            )
        kernels._bottleneck_adapter_bwd_slab_kernel[(triton.cdiv(d, by_slabs["BLOCK_D"]), groups, chunks)](
            g,
            x,
            z if h is None else h,
            dz,
            w_down,
            w_up,
            b_up,
            scale,
            gate,
            *(None,) * 5,  # no norm
            dx if needs[0] else None,
            *targets,
            n,
            stride_gm,
            stride_xm,
            alpha,
            D_IN=d_in,
            ADD_G=add_g,
            ACTIVATION=activation if h is None else "identity",
            **common,
            **by_slabs,
        )
        if any(part is not None for part in parts):
            longest = max(grad.numel() for part, grad in zip(parts, grads) if part is not None)
            kernels._bottleneck_adapter_bwd_sum_kernel[(triton.cdiv(longest, _SUM_BLOCK), 5)](
                *parts, *grads, groups, shares[4], D_IN=d_in, BLOCK_P=8, BLOCK=_SUM_BLOCK, **sizes
            )
    return dx, *grads, dgate


def _targets(
    grads: Sequence[Tensor], needs: Sequence[bool], shares: Sequence[int], d_out: int, scalar_scale: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where the slab kernel writes each parameter's gradient, and which of these are partial sums in workspace.

    A gradient of one share is written in place. That of a scalar scale has d_out values per share, still to be summed.
    """
    summed = [need and (count > 1) for need, count in zip(needs, shares)]
    lengths = [grad.numel() * count for grad, count in zip(grads, shares)]
    if needs[4] and scalar_scale:
        summed[4], lengths[4] = True, d_out * shares[4]
    if not any(summed):
        return [grad if need else None for grad, need in zip(grads, needs)], [None] * 5
    scratch = workspace([length if partial else 0 for length, partial in zip(lengths, summed)], grads[0])
    parts = [part if partial else None for part, partial in zip(scratch, summed)]
    return [p if p is not None else grad if need else None for p, grad, need in zip(parts, grads, needs)], parts
