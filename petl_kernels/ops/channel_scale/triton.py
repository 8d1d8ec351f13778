"""Triton implementation of `channel_scale`: launch settings and entry points over `triton_kernels`.

One launch forward, and for dx alone, which is the same product. With dscale one launch and, of more than one group of
rows, a second that sums the groups in a fixed order. No atomics: results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, block, dense, rows, warps
from petl_kernels.ops.channel_scale import triton_kernels as kernels

_SUM_BLOCK_D = 64
# Columns that the programs on a processor cover at once: 128 threads of 64 registers, an eighth of its 65536, take 256.
_RESIDENT = 2048


def _settings(d: int, device: Device) -> dict[str, int]:
    """Tiles of 8 rows, 16 elements for each lane; of 256 columns in 16 bits a warp reads a row in one access.

    Where a program ends, the rows of its tile are summed one after the other: of 16 some sums over 19 rows had more
    than twice the error of eager.
    """
    block_d = block(256, d)
    return dict(BLOCK_M=8, BLOCK_D=block_d, num_warps=warps(max(1, block_d // 64), device))


def _groups(n: int, d: int, settings: dict[str, int], device: Device) -> tuple[int, int]:
    """(groups, rows of each): as many as fill the processors, each of at least 32 rows and of whole tiles.

    A group's partial sums are written and read in float32: over 32 rows 4 % of what is moved of g, x and dx in 16 bits.
    """
    across = triton.cdiv(d, settings["BLOCK_D"])
    tiles = triton.cdiv(n, settings["BLOCK_M"])
    most = max(1, min(device.processors * (_RESIDENT // settings["BLOCK_D"]) // across, n // 32))
    each = triton.cdiv(tiles, min(most, tiles)) * settings["BLOCK_M"]
    return triton.cdiv(n, each), each


def unsupported(x: Tensor, scale: Tensor) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return _triton.cannot_run(x, scale)


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """y = x * scale; schema in the op's `__init__`."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    d = x.shape[-1]
    n = x.numel() // d
    x, stride_xm = rows(x)
    settings = _settings(d, _triton.device_of(x.device))
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(n, settings["BLOCK_M"]), triton.cdiv(d, settings["BLOCK_D"]))
        kernels._channel_scale_fwd_kernel[grid](x, dense(scale), y, n, stride_xm, D=d, **settings)
    return y


def backward(g: Tensor, x: Tensor | None, scale: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of (x, scale); an empty tensor for each that is not needed."""
    dscale = new_gradients((scale,), needs[1:], g)[0]
    if x is None or not needs[1]:
        return forward(g, scale) if needs[0] else g.new_empty((0,)), dscale
    dx = g.new_empty(g.shape if needs[0] else (0,))
    if g.numel() == 0:
        return dx, dscale.zero_()
    d = g.shape[-1]
    n = g.numel() // d
    (g, stride_gm), (x, stride_xm) = rows(g), rows(x)
    device = _triton.device_of(g.device)
    settings = _settings(d, device)
    groups, each = _groups(n, d, settings, device)
    target = dscale if groups == 1 else g.new_empty((groups, d), dtype=torch.float32)
    with torch.cuda.device_of(g):
        kernels._channel_scale_bwd_kernel[(groups, triton.cdiv(d, settings["BLOCK_D"]))](
            g,
            x,
            dense(scale),
            dx if needs[0] else None,
            target,
            n,
            each,
            stride_gm,
            stride_xm,
            D=d,
            **settings,
        )
        if groups > 1:
            kernels._channel_scale_bwd_sum_kernel[(triton.cdiv(d, _SUM_BLOCK_D),)](
                target, dscale, groups, D=d, BLOCK_P=16, BLOCK_D=_SUM_BLOCK_D, num_warps=warps(4, device)
            )
    return dx, dscale
