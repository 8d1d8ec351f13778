"""What a call of `channel_adapter` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from petl_kernels.ops._validate import check_channels, check_dtype, check_scale, check_shape, check_tensor

_OP = "channel_adapter"


def validate(x: Any, channels: Any, weight: Any, bias: Any, scale: Any, scale_input: Any) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; only of `channels` are values read."""
    check_tensor(_OP, "x", x, x)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., d] with at least one dimension, got a 0-dim tensor")
    check_tensor(_OP, "weight", weight, x)
    if bias is not None:
        check_tensor(_OP, "bias", bias, x)
        check_dtype(_OP, "bias", bias, weight, "weight")
    check_scale(_OP, scale, x, ((), (1,)), "[] or [1]")
    if not isinstance(scale_input, bool):
        raise TypeError(f"{_OP}: scale_input must be True or False, got {scale_input!r}")
    check_channels(_OP, channels, x.shape[-1], x)
    k = channels.shape[0]
    check_shape(_OP, "weight", weight, (k, k), "[k, k]")
    if bias is not None:
        check_shape(_OP, "bias", bias, (k,), "[k]")
