"""What a call of `adapter_bank` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._validate import check_dtype, check_shape, check_tensor
from petl_kernels.ops.bottleneck_adapter.reference import CODES

_OP = "adapter_bank"
# All but the softmax, of which z would be the value (see `bottleneck_adapter`).
ACTIVATIONS = tuple(name for name in CODES if name != "softmax")


def validate(
    x: Any, task: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, residual: Any, scale: Any, activation: Any
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; of values only those of `task` are read."""
    check_tensor(_OP, "x", x, x)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., d_in] with at least one dimension, got a 0-dim tensor")
    _check_list("w_down", w_down)
    _check_list("w_up", w_up)
    if not isinstance(w_down[0], Tensor) or w_down[0].dim() != 2:
        raise ValueError(f"{_OP}: w_down[0] must be a tensor [r, d_in], got {_words(w_down[0])}")
    if not isinstance(w_up[0], Tensor) or w_up[0].dim() != 2:
        raise ValueError(f"{_OP}: w_up[0] must be a tensor [d_out, r], got {_words(w_up[0])}")
    r, d_in, d_out = w_down[0].shape[0], x.shape[-1], w_up[0].shape[0]
    if 0 in (r, d_in, d_out):
        raise ValueError(f"{_OP}: d_in, r and d_out must be at least 1, got {d_in}, {r} and {d_out}")
    lists: dict[str, tuple[Any, tuple[Any, ...], str]] = {
        "w_down": (w_down, (r, d_in), "[r, d_in]"),
        "w_up": (w_up, (d_out, r), "[d_out, r]"),
    }
    for name, values, width, words in (("b_down", b_down, r, "[r]"), ("b_up", b_up, d_out, "[d_out]")):
        if values is not None:
            _check_list(name, values)
            lists[name] = (values, (width,), words)
    for name, (values, shape, words) in lists.items():
        if len(values) != len(w_down):
            raise ValueError(f"{_OP}: {name} must have one entry per task = {len(w_down)}, got {len(values)}")
        for i, value in enumerate(values):
            check_tensor(_OP, f"{name}[{i}]", value, x)
            check_shape(_OP, f"{name}[{i}]", value, shape, words)
            check_dtype(_OP, f"{name}[{i}]", value, w_down[0], "w_down[0]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if residual is not None:
        check_tensor(_OP, "residual", residual, x)
        check_shape(_OP, "residual", residual, (*x.shape[:-1], d_out), "[..., d_out]")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{_OP}: scale must be a float, got {type(scale).__name__}")
    _check_task(task, x, len(w_down))


def _check_list(name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{_OP}: {name} must be a tensor per task, in a list or stacked, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{_OP}: {name} must have at least one task, got an empty list")


def _words(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_task(task: Any, x: Tensor, tasks: int) -> None:
    """int64, on x's device, of the shape of x's first dimensions; on the CPU with values in [0, tasks).

    On a GPU the values are not read, because the host would have to wait for them, and a compiler sees none.
    """
    if not isinstance(task, Tensor):
        raise TypeError(f"{_OP}: task must be a tensor, got {type(task).__name__}")
    if task.dtype != torch.int64:
        raise TypeError(f"{_OP}: task must be int64, got {task.dtype}")
    if task.device != x.device:
        raise ValueError(f"{_OP}: task must be on x's device {x.device}, got {task.device}")
    if task.dim() >= x.dim() or task.shape != x.shape[: task.dim()]:
        raise ValueError(
            f"{_OP}: task must have the shape of x's first dimensions, x being {list(x.shape)}, got {list(task.shape)}"
        )
    if task.device.type != "cpu" or torch.compiler.is_compiling() or type(task) is not Tensor:
        return
    check_range(_OP, task.flatten().tolist(), tasks)


def check_range(owner: str, values: Sequence[int], tasks: int) -> None:
    """Indices of existing tasks; names the first few that are not."""
    if values and not 0 <= min(values) <= max(values) < tasks:
        wrong = [value for value in values if not 0 <= value < tasks]
        words = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(f"{owner}: task must lie in [0, {tasks}), got {words}")
