"""`layer_norm` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, empty, empty_like, new_gradients, nothing, row_major, rows


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over x: y, and mean and rstd when they are to be saved; schema in the op's `__init__`."""
    d = x.shape[-1]
    n = x.numel() // d
    y = empty_like(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (empty((n,), wide), empty((n,), wide)) if save else (nothing(wide), nothing(wide))
    if n:
        statistics = (rows(mean), rows(rstd)) if save else (None, None)
        inputs = [row_major(t) for t in (x, weight, bias)]  # copies among them live until the call is over
        _cpu.layer_norm_forward((n, d), *map(rows, inputs), eps, rows(y), *statistics, torch.get_num_threads())
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
    """One pass over g and x: the gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    d = g.shape[-1]
    dx = empty(g.shape, g.dtype) if needs[0] else nothing(g.dtype)
    dweight, dbias = new_gradients((weight, bias), needs[1:], g.dtype)
    if g.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    normalised = needs[0] or needs[1]  # of dbias alone nothing but g is read
    present = (g, x, mean, rstd, weight) if normalised else (g, None, None, None, None)
    inputs = [row_major(t) for t in present]
    outputs = (rows(t) if need else None for t, need in zip((dx, dweight, dbias), needs))
    _cpu.layer_norm_backward((g.numel() // d, d), *map(rows, inputs), *outputs, torch.get_num_threads())
    return dx, dweight, dbias
