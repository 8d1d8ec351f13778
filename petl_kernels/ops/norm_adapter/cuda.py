"""`norm_adapter` on the CUDA kernels of `petl_kernels._cuda`: one launch forward, at most three backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._cuda import Workspace, _cuda, addable, cannot_run, launch_on, too_wide
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES


def unsupported(x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, w_down: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return cannot_run(x, ln_weight, w_down) or too_wide(x, w_down)


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
    """y, and z and the statistics when they are to be saved; schema in the op's `__init__`."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    added = addable(residual, x)
    y = x.new_empty((*x.shape[:-1], d_out))
    z = x.new_empty((*x.shape[:-1], r) if save else (0,))
    n = y.numel() // d_out
    mean, rstd = new_statistics(x, n if save else 0, norm)
    if n > 0:
        x_rows = row_major(x)
        added = x_rows if added is x else row_major(added)
        tensors = [x_rows, *map(row_major, (w_down, b_down, w_up, b_up)), added, row_major(scale)]
        ln_weight, ln_bias = row_major(ln_weight), row_major(ln_bias)
        adapter = _cuda.Adapter(
            (n, d_in, r, d_out),
            *map(rows, tensors),
            0 if scale is None else scale.numel(),
            float(alpha),
            CODES[activation],
            rows(y),
            rows(z) if save else None,
            0,
        )
        statistics = (rows(mean) if mean.numel() else None, rows(rstd) if save else None)
        normal = _cuda.Norm(rows(ln_weight), rows(ln_bias), eps, norm == "rms", *statistics)
        _cuda.norm_adapter_forward(launch_on(x.device), adapter, normal, Workspace(x.device))
    return y if residual is None or added is not None else residual + y, z, mean, rstd


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
    """The gradients of (x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale); empty where not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    grads = new_gradients((ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale), needs[1:], z)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    g = g.to(z.dtype)  # of a residual of another dtype
    tensors = [row_major(t) for t in (g, x, z, w_down, w_up, b_up, scale)]
    ln_weight, ln_bias = row_major(ln_weight), row_major(ln_bias)
    wanted = [rows(t) if need else None for t, need in zip((dx, *grads), needs)]
    adapter = _cuda.AdapterGradients(
        (g.numel() // d_out, d_in, r, d_out),
        *map(rows, tensors),
        0 if scale is None else scale.numel(),
        float(alpha),
        CODES[activation],
        add_g,
        wanted[0],
        *wanted[3:],
        0,
    )
    statistics = (rows(mean) if mean.numel() else None, rows(rstd))
    normal = _cuda.Norm(rows(ln_weight), rows(ln_bias), 0.0, norm == "rms", *statistics)
    _cuda.norm_adapter_backward(launch_on(g.device), adapter, normal, *wanted[1:3], Workspace(g.device))
    return dx, *grads
