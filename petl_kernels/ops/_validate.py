"""Checks of arguments that every op shares; each error names op, argument, got and wanted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# channels -> (version, size) of the last check that they passed, so that a loop does not read them again.
_passed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_tensor(op: str, name: str, value: Any, like: Tensor, of: str = "x") -> None:
    """A floating-point tensor on the device of `like`, the argument named `of`; float64 mixes with nothing."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    dtype, wanted = value.dtype, like.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {dtype}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {of}'s device {like.device}, got {value.device}")
    if dtype is not wanted and torch.float64 in (dtype, wanted):
        raise TypeError(f"{op}: {name} is {dtype} beside {of} of {wanted}; float64 mixes with no other dtype")


def check_shape(op: str, name: str, value: Tensor, wanted: tuple[Any, ...], words: str) -> None:
    """A tensor of exactly this shape, which `words` name by its dimensions."""
    if value.shape != wanted:
        raise ValueError(f"{op}: {name} must be {words} = {list(wanted)}, got {list(value.shape)}")


def check_dtype(op: str, name: str, value: Tensor, like: Tensor, of: str) -> None:
    """A tensor of the dtype of `like`, the argument named `of`."""
    if value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have {of}'s dtype {like.dtype}, got {value.dtype}")


def check_scale(op: str, value: Any, x: Tensor, shapes: tuple[tuple[Any, ...], ...], words: str) -> None:
    """A float, or a floating-point tensor of one of these shapes."""
    if isinstance(value, Tensor):
        check_tensor(op, "scale", value, x)
        if not any(value.shape == shape for shape in shapes):  # which symbolic sizes answer, unlike `in`
            raise ValueError(f"{op}: scale must be a float, {words}, got {list(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: scale must be a float or a tensor, got {type(value).__name__}")


def version(t: Tensor) -> int | None:
    """How often the tensor was written to, as autograd counts; None for inference tensors, which are not counted."""
    return None if t.is_inference() else t._version


def check_channels(op: str, channels: Any, size: int, like: Tensor, of: str = "x") -> None:
    """Distinct int64 indices [k] in [0, size), in any order, on the device of `like`.

    The values are read once per tensor and version: on a GPU that is the only time the host waits for them. A
    compiler, an exporter or a transform sees no values, and takes them on trust.
    """
    if not isinstance(channels, Tensor):
        raise TypeError(f"{op}: channels must be a tensor, got {type(channels).__name__}")
    if channels.dtype != torch.int64 or channels.dim() != 1:
        raise TypeError(f"{op}: channels must be int64 [k], got {channels.dtype} {list(channels.shape)}")
    if channels.device != like.device:
        raise ValueError(f"{op}: channels must be on {of}'s device {like.device}, got {channels.device}")
    if channels.device.type == "meta" or torch.compiler.is_compiling() or type(channels) is not Tensor:
        return
    mark = (version(channels), size)
    if mark[0] is not None and _passed.get(channels) == mark:
        return
    values = channels.tolist()
    if wrong := [c for c in values if not 0 <= c < size]:
        raise ValueError(f"{op}: channels must lie in [0, {size}), got {_some(wrong)}")
    if len(set(values)) < len(values):
        twice = [c for c, count in Counter(values).items() if count > 1]
        raise ValueError(f"{op}: channels must be distinct, got {_some(twice)} more than once")
    _passed[channels] = mark


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def autocast(x: Tensor) -> Tensor:
    """x as `F.linear` would take it: under autocast in the autocast dtype."""
    if x.dtype != torch.float64 and autocast_enabled(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device = x.device.type
    # The meta device has no autocast, and asking whether it is on is an error.
    return device != "meta" and torch.is_autocast_enabled(device)
