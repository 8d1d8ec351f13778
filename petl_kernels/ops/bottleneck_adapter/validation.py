"""What a call of `bottleneck_adapter` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from petl_kernels.ops._validate import check_dtype, check_scale, check_shape, check_tensor
from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS

_OP = "bottleneck_adapter"


def _check_bias(name: str, value: Tensor | None, x: Tensor, w: Tensor, words: str) -> None:
    if value is None:
        return
    check_tensor(_OP, name, value, x)
    if value.dtype != w.dtype:
        raise TypeError(f"{_OP}: {name} must have the dtype of its weight, {w.dtype}, got {value.dtype}")
    check_shape(_OP, name, value, (w.shape[0],), words)


def validate(
    x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, residual: Any, scale: Any, activation: Any
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_tensor(_OP, "x", x, x)
    check_tensor(_OP, "w_down", w_down, x)
    check_tensor(_OP, "w_up", w_up, x)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., d_in] with at least one dimension, got a 0-dim tensor")
    if w_down.dim() != 2 or w_down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{_OP}: w_down must be [r, d_in] with d_in = {x.shape[-1]} (x's last dimension), got {list(w_down.shape)}"
        )
    if w_up.dim() != 2 or w_up.shape[1] != w_down.shape[0]:
        raise ValueError(
            f"{_OP}: w_up must be [d_out, r] with r = {w_down.shape[0]} (w_down's rows), got {list(w_up.shape)}"
        )
    if 0 in w_down.shape or w_up.shape[0] == 0:
        raise ValueError(
            f"{_OP}: d_in, r and d_out must be at least 1, got w_down {list(w_down.shape)}, w_up {list(w_up.shape)}"
        )
    check_dtype(_OP, "w_up", w_up, w_down, "w_down")
    _check_bias("b_down", b_down, x, w_down, "[r]")
    _check_bias("b_up", b_up, x, w_up, "[d_out]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        check_tensor(_OP, "residual", residual, x)
        check_shape(_OP, "residual", residual, (*x.shape[:-1], w_up.shape[0]), "[..., d_out]")
    check_scale(_OP, scale, x, ((), (1,), (w_up.shape[0],)), f"[], [1] or [d_out] = [{w_up.shape[0]}]")
