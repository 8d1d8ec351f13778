"""`norm_adapter` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._native import _cpu, empty, new_gradients, nothing, row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over x: y, and z and the statistics when they are to be saved; schema in the op's `__init__`."""
    *leading, d_in = x.shape
    d_out, r = w_up.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = empty((*leading, d_out), dtype)
    z = empty((*leading, r), x.dtype) if save else nothing(x.dtype)
    n = y.numel() // d_out
    mean, rstd = new_statistics(x, n if save else 0, norm)
    if n == 0:
        return y, z, mean, rstd
    residual = row_major(None if residual is None else residual.to(dtype))
    tensors = [row_major(t) for t in (x, w_down, b_down, w_up, b_up)]
    scale, ln_weight, ln_bias = (row_major(t) for t in (scale, ln_weight, ln_bias))
    adapter = _cpu.Adapter(
        (n, d_in, r, d_out),
        *map(rows, tensors),
        rows(residual),
        rows(scale),
        0 if scale is None else scale.numel(),
        alpha,
        CODES[activation],
        rows(y),
        rows(z) if save else None,
        torch.get_num_threads(),
    )
    statistics = (rows(mean) if mean.numel() else None, rows(rstd) if save else None)
    _cpu.norm_adapter_forward(adapter, _cpu.Norm(rows(ln_weight), rows(ln_bias), eps, norm == "rms", *statistics))
    return y, z, mean, rstd


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """One pass over g and x: the gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    d_in, (d_out, r) = w_down.shape[1], w_up.shape
    dx = empty((*g.shape[:-1], d_in), z.dtype) if needs[0] else nothing(z.dtype)
    grads = new_gradients((ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale), needs[1:], z.dtype)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    tensors = [row_major(t) for t in (g, x, z, w_down, w_up, b_up, scale)]
    ln_weight, ln_bias = row_major(ln_weight), row_major(ln_bias)
    wanted = [rows(t) if need else None for t, need in zip((dx, *grads), needs)]
    adapter = _cpu.AdapterGradients(
        (g.numel() // d_out, d_in, r, d_out),
        *map(rows, tensors),
        0 if scale is None else scale.numel(),
        alpha,
        CODES[activation],
        add_g,
        wanted[0],
        *wanted[3:],
        torch.get_num_threads(),
    )
    statistics = (rows(mean) if mean.numel() else None, rows(rstd))
    normal = _cpu.Norm(rows(ln_weight), rows(ln_bias), 0.0, norm == "rms", *statistics)
    _cpu.norm_adapter_backward(adapter, normal, *wanted[1:3])
    return dx, *grads
