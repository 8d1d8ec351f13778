"""`bottleneck_adapter` on the CUDA kernels of `petl_kernels._cuda`: one launch forward, at most three backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from petl_kernels.ops._cuda import Workspace, _cuda, addable, cannot_run, launch_on, too_wide
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES


def unsupported(x: Tensor, w_down: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return cannot_run(x, w_down) or too_wide(x, w_down)


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
    """y [..., d_out] and z [..., r] (empty unless `save_z`); shapes and dtypes as in the op's schema."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    added = addable(residual, x)
    y = x.new_empty((*x.shape[:-1], d_out))
    z = x.new_empty((*x.shape[:-1], r) if save_z else (0,))
    if y.numel() > 0:
        x_rows = row_major(x)
        added = x_rows if added is x else row_major(added)
        inputs = [x_rows, *map(row_major, (w_down, b_down, w_up, b_up)), added, row_major(scale), row_major(gate)]
        _cuda.bottleneck_forward(
            launch_on(x.device),
            (y.numel() // d_out, d_in, r, d_out),
            *map(rows, inputs),
            0 if scale is None else scale.numel(),
            0 if seed is None else seed.data_ptr(),
            dropout,
            float(alpha),
            CODES[activation],
            rows(y),
            rows(z) if save_z else None,
        )
    return y if residual is None or added is not None else residual + y, z


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
    """The gradients of (x, w_down, b_down, w_up, b_up, scale, gate); an empty tensor for each that is not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    grads = new_gradients((w_down, b_down, w_up, b_up, scale, gate), needs[1:], z)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    g = g.to(z.dtype)  # of a residual of another dtype
    inputs = [row_major(t) for t in (g, x, z, w_down, w_up, b_up, scale, gate)]
    _cuda.bottleneck_backward(
        launch_on(g.device),
        (g.numel() // d_out, d_in, r, d_out),
        *map(rows, inputs),
        0 if scale is None else scale.numel(),
        0 if seed is None else seed.data_ptr(),
        dropout,
        float(alpha),
        CODES[activation],
        add_g,
        *(rows(t) if need else None for t, need in zip((dx, *grads), needs)),
        Workspace(g.device),
    )
    return dx, *grads
