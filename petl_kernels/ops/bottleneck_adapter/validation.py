"""What a call of `bottleneck_adapter` has to look like, and of each op that has its bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._validate import check_dtype, check_scale, check_shape, check_tensor
from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS

_OP = "bottleneck_adapter"


def _check_bias(op: str, name: str, value: Tensor | None, x: Tensor, w: Tensor, words: str) -> None:
    if value is None:
        return
    check_tensor(op, name, value, x)
    if value.dtype != w.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of its weight, {w.dtype}, got {value.dtype}")
    check_shape(op, name, value, (w.shape[0],), words)


def check_bottleneck(
    op: str, x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, scale: Any, activation: Any
) -> None:
    """A bottleneck whose widths fit, for each op that has one."""
    check_tensor(op, "x", x, x)
    check_tensor(op, "w_down", w_down, x)
    check_tensor(op, "w_up", w_up, x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., d_in] with at least one dimension, got a 0-dim tensor")
    if w_down.dim() != 2 or w_down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: w_down must be [r, d_in] with d_in = {x.shape[-1]} (x's last dimension), got {list(w_down.shape)}"
        )
    if w_up.dim() != 2 or w_up.shape[1] != w_down.shape[0]:
        raise ValueError(
            f"{op}: w_up must be [d_out, r] with r = {w_down.shape[0]} (w_down's rows), got {list(w_up.shape)}"
        )
    if 0 in w_down.shape or w_up.shape[0] == 0:
        raise ValueError(
            f"{op}: d_in, r and d_out must be at least 1, got w_down {list(w_down.shape)}, w_up {list(w_up.shape)}"
        )
    check_dtype(op, "w_up", w_up, w_down, "w_down")
    _check_bias(op, "b_down", b_down, x, w_down, "[r]")
    _check_bias(op, "b_up", b_up, x, w_up, "[d_out]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    check_scale(op, scale, x, ((), (1,), (w_up.shape[0],)), f"[], [1] or [d_out] = [{w_up.shape[0]}]")


def check_term(op: str, name: str, value: Any, x: Tensor, w_up: Tensor) -> None:
    """Something that is added to what the bottleneck gives: of its shape, or None."""
    if value is not None:
        check_tensor(op, name, value, x)
        check_shape(op, name, value, (*x.shape[:-1], w_up.shape[0]), "[..., d_out]")


def _check_gate(gate: Any, x: Tensor) -> None:
    check_tensor(_OP, "gate", gate, x)
    wanted = (*x.shape[:-1], 1)
    fits = gate.dim() <= len(wanted) and all(
        size == 1 or size == full for size, full in zip(gate.shape[::-1], wanted[::-1])
    )
    if not fits:
        raise ValueError(f"{_OP}: gate must broadcast to [..., 1] = {list(wanted)}, got {list(gate.shape)}")


def _check_dropout(dropout: Any, seed: Any, x: Tensor) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float, torch.SymFloat)) or not 0 <= dropout < 1:
        raise ValueError(f"{_OP}: dropout must be a probability in [0, 1), got {dropout!r}")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape not in ((), (1,)):
        got = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"{_OP}: seed must be an int64 tensor [] or [1], got {got}")
    if seed.device != x.device:
        raise ValueError(f"{_OP}: seed must be on x's device {x.device}, got {seed.device}")


def validate(
    x: Any,
    w_down: Any,
    b_down: Any,
    w_up: Any,
    b_up: Any,
    residual: Any,
    scale: Any,
    gate: Any,
    seed: Any,
    dropout: Any,
    activation: Any,
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_bottleneck(_OP, x, w_down, b_down, w_up, b_up, scale, activation)
    check_term(_OP, "residual", residual, x, w_up)
    if gate is not None:
        _check_gate(gate, x)
    if seed is not None or dropout != 0:
        _check_dropout(dropout, seed, x)
