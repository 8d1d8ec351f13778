"""What a call of `channel_linear` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from petl_kernels.ops._validate import check_channels, check_dtype, check_shape, check_tensor

_OP = "channel_linear"


def _check_frozen(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{_OP}: {name} must be frozen (requires_grad=False), it is written in place; got one that trains"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
        raise ValueError(
            f"{_OP}: {name} must not overlap itself, it is written in place; got strides {value.stride()}, expanded"
        )


def _check_bias(x: Tensor, weight: Tensor, bias: Any) -> None:
    if bias is None:
        return
    check_tensor(_OP, "bias", bias, x)
    check_dtype(_OP, "bias", bias, weight, "weight")
    check_shape(_OP, "bias", bias, (weight.shape[0],), "[d_out]")
    _check_frozen("bias", bias)


def _check_channel_bias(x: Tensor, bias: Any, channel_weight: Tensor, channel_bias: Any, dim: int) -> None:
    if channel_bias is None:
        return
    check_tensor(_OP, "channel_bias", channel_bias, x)
    if dim == 1:
        raise ValueError(f"{_OP}: channel_bias must be None with dim=1, input columns have no bias; got a tensor")
    if bias is None:
        raise ValueError(f"{_OP}: channel_bias must be None where bias is, got a tensor")
    check_dtype(_OP, "channel_bias", channel_bias, channel_weight, "channel_weight")
    check_shape(_OP, "channel_bias", channel_bias, (channel_weight.shape[0],), "[k]")


def validate(x: Any, weight: Any, bias: Any, channels: Any, channel_weight: Any, channel_bias: Any, dim: Any) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; of tensors only `channels` is read."""
    check_tensor(_OP, "x", x, x)
    check_tensor(_OP, "weight", weight, x)
    check_tensor(_OP, "channel_weight", channel_weight, x)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., d_in] with at least one dimension, got a 0-dim tensor")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        what = f"[d_out, d_in] with d_in = {x.shape[-1]} (x's last dimension), neither 0"
        raise ValueError(f"{_OP}: weight must be {what}; got {list(weight.shape)}")
    _check_frozen("weight", weight)
    _check_bias(x, weight, bias)
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"{_OP}: dim must be 0 (output rows) or 1 (input columns), got {dim!r}")
    check_channels(_OP, channels, weight.shape[dim], x)
    k = channels.shape[0]
    wanted, words = ((k, weight.shape[1]), "[k, d_in]") if dim == 0 else ((weight.shape[0], k), "[d_out, k]")
    check_shape(_OP, "channel_weight", channel_weight, wanted, words)
    _check_channel_bias(x, bias, channel_weight, channel_bias, dim)
