"""Triton implementation of `channel_linear`: launch settings and entry points over `triton_kernels`.

The dense products y = x W^T + b and dx = g W are torch's own; what runs here is the gradient of the trained part. One
launch, or, of more than one group of rows, a second that sums the groups in a fixed order. No atomics: results are
bit-identical from run to run. The chosen columns of g are read through their index: there is no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, rows, warps, workspace
from petl_kernels.ops.channel_linear import triton_kernels as kernels

_SUM_BLOCK = 512

# Tiles of the gradient, (of k, of the frozen dimension), by the bytes of an element; 128 x 256 float32 accumulators are
# half the registers of a processor. tests/test_triton_compile.py compiles all for sm_80, sm_90, sm_100 and gfx942.
TILES = {2: ((128, 256), (64, 256), (128, 128), (64, 128), (64, 64)), 4: ((128, 128), (64, 128), (64, 64))}


class _Plan(NamedTuple):
    """A launch: tiles of k, tiles of the frozen dimension and groups of rows; and what the kernel is compiled with."""

    grid: tuple[int, int, int]
    settings: dict[str, int]


def _grid(n: int, k: int, d: int, tile: tuple[int, int], least: int, device: Device) -> tuple[int, int, int]:
    """Programs that cover k x d with such tiles: of groups of at least `least` rows as many as fit the device.

    One program of the largest tiles takes most of a processor's registers, so that one more group than fits would
    wait for all others.
    """
    across, along = triton.cdiv(k, tile[0]), max(1, triton.cdiv(d, tile[1]))
    return across, along, max(1, min(device.processors // (across * along), n // least))


def _cost(n: int, k: int, d: int, spread: int, itemsize: int, grid: tuple[int, int, int], device: Device) -> float:
    """Bytes moved per processor that is busy. Both operands are read again for each tile of the other's."""
    across, along, groups = grid
    partial = 8 * k * max(d, 1) * groups if groups > 1 else 0
    moved = n * (d * across + spread * k * along) * itemsize + partial
    programs = across * along * groups
    return moved * triton.cdiv(programs, device.processors) / programs


@lru_cache(1024)
def _plan(n: int, k: int, d: int, chosen_of: int, itemsize: int, mixed: bool, device: Device) -> _Plan:
    """The tile and the groups of rows of the least cost, for a gradient k x d; d = 0 is the bias alone.

    `chosen_of`: of how many columns of g the k are gathered (dim=0), or 0. A gathered element takes a sector of 32
    bytes from the L2 cache, shared with its neighbours among the chosen if there are any.
    """
    height = 32 if itemsize == 2 else 16
    # Partial sums, 8 bytes per element written and read, are then no more bytes than the operands' rows in 16 bits:
    # 8 k d <= 2 least (k + d).
    least = max(height, 4 * k * d // (k + d))
    spread = max(1, min(32 // itemsize, chosen_of // k))
    wanted = TILES[itemsize][-1:] if mixed else TILES[itemsize]  # two operands under way take the registers of more
    tiles = [(block(of_k, k), block(min(of_d, 4 * block(of_k, k)), max(d, 1))) for of_k, of_d in wanted]
    grids = [_grid(n, k, d, tile, least, device) for tile in tiles]
    grid, (of_k, of_d) = min(zip(grids, tiles), key=lambda plan: _cost(n, k, d, spread, itemsize, plan[0], device))
    settings = dict(
        BLOCK_M=height,
        BLOCK_O=of_k if chosen_of else of_d,
        BLOCK_I=of_d if chosen_of else of_k,
        num_warps=warps(4 if of_k * of_d <= 2048 else 8, device),
        num_stages=3 if itemsize == 2 and device.warp_size == 32 else 2,  # a third passes gfx942's 64 KiB
    )
    return _Plan(grid, settings)


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return _triton.cannot_run(x, weight, bias, channel_weight)


def backward(
    g: Tensor,
    x: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of channel_weight and channel_bias; an empty tensor for each that is not needed.

    g [..., d_out] is gathered by the kernel with dim=0; x is [..., d_in], or with dim=1 its chosen columns [..., k].
    """
    outs, ins = channel_weight.shape
    dweight, dbias = new_gradients((channel_weight, channel_bias), needs, channel_weight)
    size, with_bias = dweight.numel(), dbias.numel() > 0
    if size == 0 and not with_bias:
        return dweight, dbias
    n = g.numel() // g.shape[-1]
    g, stride_gm = rows(g)
    x, stride_xm = rows(x) if x is not None and size > 0 else (None, 0)
    mixed = x is not None and x.dtype != g.dtype  # then they are multiplied in float32
    itemsize = 4 if mixed else g.element_size()
    k, d = (outs, ins) if dim == 0 else (ins, outs)
    chosen_of = g.shape[-1] if dim == 0 else 0
    plan = _plan(n, k, d if size > 0 else 0, chosen_of, itemsize, mixed, _triton.device_of(g.device))
    groups = plan.grid[2]
    grads = [dweight if size > 0 else None, dbias if with_bias else None]
    targets = grads
    if groups > 1:
        parts = workspace([groups * size, groups * outs if with_bias else 0], dweight)
        targets = [part if grad is not None else None for part, grad in zip(parts, grads)]
    with torch.cuda.device_of(g):
        kernels._channel_linear_bwd_kernel[plan.grid](
            g,
            x,
            channels.contiguous() if dim == 0 else None,
            *targets,
            n,
            outs,
            stride_gm,
            stride_xm,
            INS=ins,
            MIXED=mixed,
            PRECISION=_triton.precision(),
            **plan.settings,
        )
        if groups > 1:
            blocks = triton.cdiv(size, _SUM_BLOCK) + (triton.cdiv(outs, _SUM_BLOCK) if with_bias else 0)
            kernels._channel_linear_bwd_sum_kernel[(blocks,)](
                *targets, *grads, groups, size, outs, BLOCK_P=4, BLOCK=_SUM_BLOCK
            )
    return dweight, dbias
