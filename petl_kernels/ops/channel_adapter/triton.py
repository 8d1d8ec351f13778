"""Triton implementation of `channel_adapter`: launch settings and entry points over `triton_kernels`.

One launch forward, one or two backward: dx and, by other programs of the same launch, shares of the parameters'
gradients; then, of more than one share, their sum in a fixed order. No atomics: results are bit-identical from run to
run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, dense, rows, warps, workspace
from petl_kernels.ops.channel_adapter import triton_kernels as kernels

_MAX_CHANNELS = 512
_SUM_BLOCK = 512

# Launch settings. The bounds on tiles are where the kernels, compiled for sm_80, sm_90, sm_100 and gfx942, begin to
# spill registers or pass the shared memory; tests/test_triton_compile.py compiles them all.


def _row_settings(n: int, d: int, k: int, itemsize: int, device: Device) -> dict[str, int]:
    """Tiles of the programs that walk rows: as many rows as still give every processor a program."""
    half = itemsize == 2
    block_k = block((128 if k <= 128 else 64) if half else 32, k)  # all of 128 channels in one tile, gathered once
    most = 64 if half else 32
    fill = n // device.processors
    return dict(
        BLOCK_M=min(most, 64 if fill >= 64 else 32 if fill >= 32 else 16),
        BLOCK_D=block(128 if half else 64, d),
        BLOCK_K=block_k,
        num_warps=warps(8, device),
        num_stages=2,
    )


def _share_settings(k: int, itemsize: int) -> dict[str, int]:
    """Tiles of the programs that walk down rows with a tile of M in registers."""
    return dict(BLOCK_N=32 if itemsize == 2 else 16, BLOCK_S=block(128 if itemsize == 2 else 32, k))


def _groups(n: int, k: int, tiles: int, device: Device) -> int:
    """Groups of rows: enough to fill the device, each of at least 4 k rows, so that the shares stay small beside x."""
    return max(1, min(triton.cdiv(device.processors, max(tiles, 1)), n // (4 * max(k, 16))))


def unsupported(
    x: Tensor, channels: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, scale_input: bool
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if channels.shape[0] > _MAX_CHANNELS:
        return f"it takes at most {_MAX_CHANNELS} channels, got k = {channels.shape[0]}"
    return _triton.cannot_run(x, weight)


def forward(
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    scale_input: bool,
    save_x: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., d] and x_channels [..., k] (empty unless `save_x`); shapes and dtypes as in the op's schema."""
    d, k = x.shape[-1], channels.shape[0]
    y = x.new_empty(x.shape)
    x_channels = x.new_empty((*x.shape[:-1], k) if save_x else (0,))
    if y.numel() == 0:
        return y, x_channels
    n = y.numel() // d
    settings = _row_settings(n, d, k, x.element_size(), _triton.device_of(x.device))
    x, stride_xm = rows(x)
    with torch.cuda.device_of(x):
        kernels._channel_adapter_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            channels.contiguous(),
            weight.contiguous(),
            dense(bias),
            scale,
            y,
            x_channels if save_x else None,
            n,
            stride_xm,
            float(alpha),
            D=d,
            K=k,
            SCALE_INPUT=scale_input,
            PRECISION=_triton.precision(),
            **settings,
        )
    return y, x_channels


def backward(
    g: Tensor,
    x_channels: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    scale_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, weight, bias, scale); an empty tensor for each that is not needed."""
    d, k = g.shape[-1], channels.shape[0]
    n = g.numel() // d if d else 0
    dx = g.new_empty(g.shape if needs[0] else (0,))
    grads = new_gradients((weight, bias, scale), needs[1:], g)
    g, stride_gm = rows(g)
    device, itemsize = _triton.device_of(g.device), g.element_size()
    by_rows, by_shares = _row_settings(n, d, k, itemsize, device), _share_settings(k, itemsize)
    row_blocks = triton.cdiv(n, by_rows["BLOCK_M"]) if needs[0] else 0
    side = triton.cdiv(k, by_shares["BLOCK_S"])
    tiles = 0 if not any(needs[1:]) else side * side if needs[1] or needs[3] else side
    groups = _groups(n, k, tiles, device)
    targets, parts = _targets(grads, needs[1:], groups, tiles)
    with torch.cuda.device_of(g):
        if row_blocks + tiles > 0:
            kernels._channel_adapter_bwd_kernel[(row_blocks + groups * tiles,)](
                g,
                x_channels if needs[1] or needs[3] else None,
                channels.contiguous(),
                weight.contiguous(),
                dense(bias),
                scale,
                dx if needs[0] else None,
                *targets,
                n,
                stride_gm,
                float(alpha),
                row_blocks,
                groups,
                D=d,
                K=k,
                SCALE_INPUT=scale_input,
                PRECISION=_triton.precision(),
                **by_rows,
                **by_shares,
            )
        if any(part is not None for part in parts):
            longest = max(grad.numel() for part, grad in zip(parts, grads) if part is not None)
            kernels._channel_adapter_bwd_sum_kernel[(triton.cdiv(longest, _SUM_BLOCK), 3)](
                *parts, *grads, groups, groups * tiles, K=k, BLOCK_P=8, BLOCK=_SUM_BLOCK
            )
    return dx, *grads


def _targets(
    grads: Sequence[Tensor], needs: Sequence[bool], groups: int, tiles: int
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where the shares of each gradient are written, and which of these are workspace that is still to be summed.

    The gradient itself where there is one share of each; a scale's then has one tile.
    """
    wanted = [grad if need else None for grad, need in zip(grads, needs)]
    if groups * tiles == 1 or not any(needs):
        return wanted, [None] * 3
    shares = (groups, groups, groups * tiles)
    scratch = workspace([0 if grad is None else grad.numel() * count for grad, count in zip(wanted, shares)], grads[0])
    parts = [None if grad is None else part for grad, part in zip(wanted, scratch)]
    return parts, parts
