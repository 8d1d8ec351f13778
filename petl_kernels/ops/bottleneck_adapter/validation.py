"""What a call of `bottleneck_adapter` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS

_OP = "bottleneck_adapter"
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def _check_tensor(name: str, value: Any, like: Tensor) -> None:
    """Device and dtype against those of x; x itself comes with itself as `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(value).__name__}")
    dtype, of_x = value.dtype, like.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{_OP}: {name} must be float32, bfloat16, float16 or float64, got {dtype}")
    if value.device != like.device:
        raise ValueError(f"{_OP}: {name} must be on x's device {like.device}, got {value.device}")
    if dtype is not of_x and torch.float64 in (dtype, of_x):
        raise TypeError(f"{_OP}: {name} is {dtype} beside x of {of_x}; float64 mixes with no other dtype")


def _check_shape(name: str, value: Tensor, wanted: tuple[Any, ...], words: str) -> None:
    if value.shape != wanted:
        raise ValueError(f"{_OP}: {name} must be {words} = {list(wanted)}, got {list(value.shape)}")


def _check_bias(name: str, value: Tensor | None, x: Tensor, w: Tensor, words: str) -> None:
    if value is None:
        return
    _check_tensor(name, value, x)
    if value.dtype != w.dtype:
        raise TypeError(f"{_OP}: {name} must have the dtype of its weight, {w.dtype}, got {value.dtype}")
    _check_shape(name, value, (w.shape[0],), words)


def validate(
    x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, residual: Any, scale: Any, activation: Any
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    _check_tensor("x", x, x)
    _check_tensor("w_down", w_down, x)
    _check_tensor("w_up", w_up, x)
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
    if w_up.dtype != w_down.dtype:
        raise TypeError(f"{_OP}: w_up must have w_down's dtype {w_down.dtype}, got {w_up.dtype}")
    _check_bias("b_down", b_down, x, w_down, "[r]")
    _check_bias("b_up", b_up, x, w_up, "[d_out]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        _check_tensor("residual", residual, x)
        _check_shape("residual", residual, (*x.shape[:-1], w_up.shape[0]), "[..., d_out]")
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, x)
        if tuple(scale.shape) not in ((), (1,), (w_up.shape[0],)):
            raise ValueError(
                f"{_OP}: scale must be a float, [], [1] or [d_out] = [{w_up.shape[0]}], got {list(scale.shape)}"
            )
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{_OP}: scale must be a float or a tensor, got {type(scale).__name__}")
