"""`adapter_norm` on the CPU kernels of `petl_kernels._cpu`."""

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
    residual: Tensor | None,
    hidden: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    eps: float,
    save: bool,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over x and residual: y, and z and the statistics when they are to be saved; schema in `__init__`."""
    if save and not store:
        raise NotImplementedError("these kernels keep the normalised rows")
    *leading, d_in = x.shape
    d, r = w_up.shape
    y = empty((*leading, d), x.dtype if hidden is None else hidden.dtype)
    z = empty((*leading, r), x.dtype) if save else nothing(x.dtype)
    n = y.numel() // d
    mean, rstd = new_statistics(x, n if save else 0, norm, centred=not store)
    kept = empty(y.shape, y.dtype) if store else nothing(y.dtype)
    if n == 0:
        return y, z, mean, rstd, kept
    x_rows, residual = row_major(x), row_major(residual)
    term_rows = x_rows if hidden is None else row_major(hidden)
    tensors = [row_major(t) for t in (w_down, b_down, w_up, b_up)]
    scale, ln_weight, ln_bias = (row_major(t) for t in (scale, ln_weight, ln_bias))
    adapter = _cpu.Adapter(
        (n, d_in, r, d),
        rows(x_rows),
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
    normal = _cpu.Norm(rows(ln_weight), rows(ln_bias), eps, norm == "rms", *statistics)
    _cpu.adapter_norm_forward(adapter, rows(term_rows), normal, rows(kept) if store else None)
    return y, z, mean, rstd, kept


def backward(
    g: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    hidden: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normal: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    norm: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """One pass over g, normal and x: the gradients that `needs` names, the others empty; schema in `__init__`."""
    d_in, (d, r) = w_down.shape[1], w_up.shape
    dx = empty((*g.shape[:-1], d_in), z.dtype) if needs[0] else nothing(z.dtype)
    dsum = empty(g.shape, g.dtype) if needs[1] else nothing(g.dtype)
    grads = new_gradients((w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale), needs[2:], z.dtype)
    if g.numel() == 0:
        return dx, dsum, *(grad.zero_() for grad in grads)
    g_rows, x, z_rows = (row_major(t) for t in (g, x, z))
    tensors = [row_major(t) for t in (w_down, w_up, b_up, scale)]
    ln_weight, ln_bias = row_major(ln_weight), row_major(ln_bias)
    wanted = [rows(t) if need else None for t, need in zip((dx, dsum, *grads), needs)]
    adapter = _cpu.AdapterGradients(
        (g.numel() // d, d_in, r, d),
        *map(rows, (g_rows, x, z_rows, *tensors)),
        0 if scale is None else scale.numel(),
        alpha,
        CODES[activation],
        add_g,
        wanted[0],
        *wanted[2:6],
        wanted[8],
        torch.get_num_threads(),
    )
    normalisation = _cpu.Norm(rows(ln_weight), rows(ln_bias), 0.0, norm == "rms", None, rows(rstd))
    _cpu.adapter_norm_backward(adapter, normalisation, rows(row_major(normal)), wanted[1], *wanted[6:8])
    return dx, dsum, *grads
