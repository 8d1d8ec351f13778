"""`bottleneck_adapter` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, empty, empty_like, new_gradients, nothing, row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


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
    """One pass over x: y, and z when it is to be saved; schema in the op's `__init__`."""
    *leading, d_in = x.shape
    d_out, r = w_up.shape
    dtype = x.dtype
    if residual is not None and residual.dtype is not dtype:
        dtype = torch.promote_types(dtype, residual.dtype)
        residual = residual.to(dtype)
    y = empty_like(x) if d_in == d_out and dtype == x.dtype else empty((*leading, d_out), dtype)
    z = empty((*leading, r), x.dtype) if save_z else nothing(x.dtype)
    if y.numel() == 0:
        return y, z
    inputs = [row_major(t) for t in (x, w_down, b_down, w_up, b_up, residual, scale, gate)]
    _cpu.bottleneck_forward(
        (y.numel() // d_out, d_in, r, d_out),
        *map(rows, inputs),
        0 if scale is None else scale.numel(),
        0 if seed is None else seed.data_ptr(),
        dropout,
        alpha,
        CODES[activation],
        rows(y),
        rows(z) if save_z else None,
        torch.get_num_threads(),
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
    """One pass over g and x: the gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    d_in, (d_out, r) = w_down.shape[1], w_up.shape
    dx = empty((*g.shape[:-1], d_in), z.dtype) if needs[0] else nothing(z.dtype)
    grads = new_gradients((w_down, b_down, w_up, b_up, scale, gate), needs[1:], z.dtype)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    inputs = [row_major(t) for t in (g, x, z, w_down, w_up, b_up, scale, gate)]
    outputs = [rows(t) if need else None for t, need in zip((dx, *grads), needs)]
    _cpu.bottleneck_backward(
        (g.numel() // d_out, d_in, r, d_out),
        *map(rows, inputs),
        0 if scale is None else scale.numel(),
        0 if seed is None else seed.data_ptr(),
        dropout,
        alpha,
        CODES[activation],
        add_g,
        *outputs,
        torch.get_num_threads(),
    )
    return dx, *grads
