"""Triton implementation of `layer_norm`: launch settings and entry points over `triton_kernels`.

One launch forward; backward one launch for dx and the groups' shares of dweight and dbias and, of more than one group,
a second that sums them in a fixed order. No atomics: results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._triton import Device, dense, rows, warps
from petl_kernels.ops.layer_norm import triton_kernels as kernels

_MAX_WIDTH = 8192
_SUM_BLOCK_D = 64


def _settings(d: int, device: Device) -> dict[str, int]:
    """Whole rows, as many as make 2048 elements, and 16 elements for each lane."""
    block_d = triton.next_power_of_2(d)
    block_m = max(1, min(32, 2048 // block_d))
    count = max(1, min(16, block_m * block_d // 512))
    return dict(BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps(count, device))


def _groups(n: int, block_m: int, partials: bool, device: Device) -> tuple[int, int]:
    """(groups, rows of each): where they leave partial sums behind one per processor, each of at least 32 rows."""
    tiles = triton.cdiv(n, block_m)
    most = max(1, min(device.processors, n // 32)) if partials else tiles
    each = triton.cdiv(tiles, min(most, tiles)) * block_m
    return triton.cdiv(n, each), each


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if x.shape[-1] > _MAX_WIDTH:
        return f"it holds whole rows of at most {_MAX_WIDTH} elements, got d = {x.shape[-1]}"
    return _triton.cannot_run(x, weight, bias)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd (empty unless `save`); schema in the op's `__init__`."""
    d = x.shape[-1]
    n = x.numel() // d
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty((n if save else 0,), dtype=torch.float32) for _ in range(2))
    if n == 0:
        return y, mean, rstd
    x, stride_xm = rows(x)
    settings = _settings(d, _triton.device_of(x.device))
    with torch.cuda.device_of(x):
        kernels._layer_norm_fwd_kernel[(triton.cdiv(n, settings["BLOCK_M"]),)](
            x,
            dense(weight),
            dense(bias),
            y,
            mean if save else None,
            rstd if save else None,
            n,
            stride_xm,
            float(eps),
            D=d,
            **settings,
        )
    return y, mean, rstd


def backward(
    g: Tensor,
    x: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (x, weight, bias); an empty tensor for each that is not needed."""
    d = g.shape[-1]
    n = g.numel() // d
    dx = g.new_empty(g.shape if needs[0] else (0,))
    grads = new_gradients((weight, bias), needs[1:], g)
    if n == 0:
        return dx, grads[0].zero_(), grads[1].zero_()
    g, stride_gm = rows(g)
    x, stride_xm = rows(x) if x is not None and (needs[0] or needs[1]) else (None, 0)
    device = _triton.device_of(g.device)
    settings = _settings(d, device)
    groups, each = _groups(n, settings["BLOCK_M"], needs[1] or needs[2], device)
    targets = [grad if need else None for grad, need in zip(grads, needs[1:])]
    parts: list[Tensor | None] = [None, None]
    if groups > 1 and (needs[1] or needs[2]):
        workspace = g.new_empty((2, groups, d), dtype=torch.float32)
        parts = [part if need else None for part, need in zip(workspace, needs[1:])]
    with torch.cuda.device_of(g):
        kernels._layer_norm_bwd_kernel[(groups,)](
            g,
            x,
            mean,
            rstd,
            dense(weight),
            dx if needs[0] else None,
            *(target if part is None else part for target, part in zip(targets, parts)),
            n,
            each,
            stride_gm,
            stride_xm,
            D=d,
            **settings,
        )
        if any(part is not None for part in parts):
            kernels._layer_norm_bwd_sum_kernel[(triton.cdiv(d, _SUM_BLOCK_D), 2)](
                *parts, *grads, groups, D=d, BLOCK_P=16, BLOCK_D=_SUM_BLOCK_D, num_warps=warps(4, device)
            )
    return dx, grads[0], grads[1]
