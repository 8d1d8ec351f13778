"""`adapter_norm` on the CUDA kernels of `petl_kernels._cuda`: one launch forward, at most three backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._cuda import Workspace, _cuda, cannot_run, launch_on, too_wide
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES


def unsupported(x: Tensor, residual: Tensor | None, hidden: Tensor | None, w_down: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return cannot_run(x, residual, hidden, w_down) or too_wide(x, w_down)


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
    """y, and z, rstd and the normalised rows when they are to be saved; schema in the op's `__init__`."""
    if save and not store:
        raise NotImplementedError("these kernels keep the normalised rows")
    (r, d_in), d = w_down.shape, w_up.shape[0]
    y = (x if hidden is None else hidden).new_empty((*x.shape[:-1], d))
    z = x.new_empty((*x.shape[:-1], r) if save else (0,))
    n = y.numel() // d
    mean, rstd = new_statistics(x, n if save else 0, norm, centred=not store)
    kept = y.new_empty(y.shape if store else (0,))
    if n == 0:
        return y, z, mean, rstd, kept
    x_rows = row_major(x)
    term = x_rows if hidden is None else row_major(hidden)
    tensors = [x_rows, *map(row_major, (w_down, b_down, w_up, b_up, residual, scale))]
    ln_weight, ln_bias = row_major(ln_weight), row_major(ln_bias)
    adapter = _cuda.Adapter(
        (n, d_in, r, d),
        *map(rows, tensors),
        0 if scale is None else scale.numel(),
        float(alpha),
        CODES[activation],
        rows(y),
        rows(z) if save else None,
        0,
    )
    normal = _cuda.Norm(rows(ln_weight), rows(ln_bias), eps, norm == "rms", None, rows(rstd) if save else None)
    _cuda.adapter_norm_forward(
        launch_on(x.device), adapter, rows(term), normal, rows(kept) if store else None, Workspace(x.device)
    )
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
    """The gradients of (x, the sum, w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale); empty where not needed."""
    (r, d_in), d = w_down.shape, w_up.shape[0]
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    dsum = g.new_empty(g.shape if needs[1] else (0,))
    grads = new_gradients((w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale), needs[2:], z)
    if g.numel() == 0:
        return dx, dsum, *(grad.zero_() for grad in grads)
    tensors = [row_major(t) for t in (g, x, z, w_down, w_up, b_up, scale)]
    ln_weight, ln_bias, kept = row_major(ln_weight), row_major(ln_bias), row_major(normal)
    wanted = [rows(t) if need else None for t, need in zip((dx, dsum, *grads), needs)]
    adapter = _cuda.AdapterGradients(
        (g.numel() // d, d_in, r, d),
        *map(rows, tensors),
        0 if scale is None else scale.numel(),
        float(alpha),
        CODES[activation],
        add_g,
        wanted[0],
        *wanted[2:6],
        wanted[8],
        0,
    )
    of_norm = _cuda.Norm(rows(ln_weight), rows(ln_bias), 0.0, norm == "rms", None, rows(rstd))
    _cuda.adapter_norm_backward(
        launch_on(g.device), adapter, of_norm, rows(kept), wanted[1], *wanted[6:8], Workspace(g.device)
    )
    return dx, dsum, *grads
