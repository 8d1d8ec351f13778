"""`channel_scale` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, empty, empty_like, new_gradients, nothing, row_major, rows


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """y = x * scale; schema in the op's `__init__`."""
    d = x.shape[-1]
    y = empty_like(x)
    if n := x.numel() // d:
        inputs = [row_major(t) for t in (x, scale)]  # copies among them live until the call is over
        _cpu.channel_scale_forward((n, d), *map(rows, inputs), rows(y), torch.get_num_threads())
    return y


def backward(g: Tensor, x: Tensor | None, scale: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """One pass over g and x: the gradients that `needs` names, the other empty; schema in the op's `__init__`."""
    d = g.shape[-1]
    dx = empty(g.shape, g.dtype) if needs[0] else nothing(g.dtype)
    dscale = new_gradients((scale,), needs[1:], g.dtype)[0]
    if g.numel() == 0:
        return dx, dscale.zero_()
    inputs = [row_major(t) for t in (g, x if needs[1] else None, scale)]
    outputs = (rows(t) if need else None for t, need in zip((dx, dscale), needs))
    _cpu.channel_scale_backward((g.numel() // d, d), *map(rows, inputs), *outputs, torch.get_num_threads())
    return dx, dscale
