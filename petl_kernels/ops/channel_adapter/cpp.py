"""`channel_adapter` on the CPU kernels of `petl_kernels._cpu`."""

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
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    scale_input: bool,
    save_x: bool,
) -> tuple[Tensor, Tensor]:
    """One pass over x: y, and x_channels when they are to be saved; schema in the op's `__init__`."""
    *leading, d = x.shape
    k = channels.shape[0]
    y = empty_like(x)
    x_channels = empty((*leading, k), x.dtype) if save_x else nothing(x.dtype)
    if y.numel() == 0:
        return y, x_channels
    channels = channels.contiguous()
    inputs = [row_major(t) for t in (x, weight, bias, scale)]
    _cpu.channel_adapter_forward(
        (y.numel() // d, d, k),
        channels.data_ptr(),
        *map(rows, inputs),
        alpha,
        scale_input,
        rows(y),
        rows(x_channels) if save_x else None,
        torch.get_num_threads(),
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
    """One pass over g and x_channels: the gradients that `needs` names, the others empty; schema in `__init__`."""
    d, k = g.shape[-1], channels.shape[0]
    dx = empty_like(g) if needs[0] else nothing(g.dtype)
    grads = new_gradients((weight, bias, scale), needs[1:], g.dtype)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    channels = channels.contiguous()
    inputs = [row_major(t) for t in (g, x_channels, weight, bias, scale)]
    outputs = [rows(t) if need else None for t, need in zip((dx, *grads), needs)]
    _cpu.channel_adapter_backward(
        (g.numel() // d, d, k),
        channels.data_ptr(),
        *map(rows, inputs),
        alpha,
        scale_input,
        *outputs,
        torch.get_num_threads(),
    )
    return dx, *grads
