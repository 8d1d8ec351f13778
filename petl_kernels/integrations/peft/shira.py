"""SHiRA: trained elements of a frozen weight, by `channel_linear` where they are whole rows or whole columns.

    W' = W + S;    y = x W'^T + b        S holds the trained values at fixed (row, column) places

The library copies W at every call, and its backward forms the dense gradient of W' to gather the values' from it. Here
the op is given the copy, puts `W + S` of the chosen rows or columns into it and computes their gradient alone. W itself
stays as it is, for disabling, merging and the state_dict. Forward + backward at 4096 x 768 with 16 or 96 rows or
columns is 1.38 to 1.73 times faster in fp32, 1.43 to 1.57 times in bf16 (2 cores, AVX-512 with bf16).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.shira.layer import Linear
from torch import Tensor, nn

from petl_kernels.integrations.peft import _tuner
from petl_kernels.ops.channel_linear import channel_linear

LIBRARY = Linear
HOLDER = "shira_weight"


def layer_obstacle(layer: Any) -> str | None:
    """Why no adapter over this linear can run fused, or None; the library calls no hooks of its base layer."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}, not nn.Linear"
    if not _tuner.plain(base.weight):
        return f"its base weight is a {type(base.weight).__name__}, not a plain tensor"
    if "forward" in layer.__dict__:
        return "its own forward is replaced"
    if not isinstance(layer, FusedLayer):  # masks at random, the library's own, have nothing to gain from a swap
        reasons = [obstacle(layer, name) for name in layer.shira_weight]
        return reasons[0] if all(reasons) else None
    return None


def obstacle(layer: Any, name: str) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    if not _tuner.plain(layer.shira_weight[name]):
        return f"its values are a {type(layer.shira_weight[name]).__name__}, not a plain tensor"
    if name not in layer.shira_indices or _channels(layer, name) is None:
        return "its indices are elements of the weight, not whole rows or columns"
    return None


def _channels(layer: Any, name: str) -> tuple[int, Tensor] | None:
    """The dimension and the channels that the adapter's values fill in their order, or None."""
    indices = layer.shira_indices[name]
    known = getattr(layer, "fused_channels", {})  # their values are read on the host: once per tensor
    if name in known and known[name][0] is indices and known[name][1] == indices._version:
        return known[name][2]
    found = _whole(indices.long(), (layer.out_features, layer.in_features))
    if isinstance(layer, FusedLayer):
        layer.fused_channels = {**known, name: (indices, indices._version, found)}
    return found


def _whole(indices: Tensor, shape: tuple[int, int]) -> tuple[int, Tensor] | None:
    """The dimension and the channels of [2, n] (row, column) pairs, which go through them row by row; else None."""
    for dim in (0, 1):
        channels = indices[dim].unique()
        if indices.shape[1] != channels.numel() * shape[1 - dim]:
            continue
        others = torch.arange(shape[1 - dim], device=indices.device)
        wanted = torch.cartesian_prod(*((channels, others) if dim == 0 else (others, channels)))
        if torch.equal(indices, wanted.T):
            return dim, channels
    return None


class FusedLayer(_tuner.FusedTuner, Linear):
    """In front of the library's class: the same forward with one call of the op where one plain adapter is active."""

    fused_channels: dict[str, tuple[Tensor, int, tuple[int, Tensor] | None]]

    def _fused(self, x: Tensor) -> Tensor | None:
        name = _tuner.lone_adapter(self, HOLDER)
        if name is None or layer_obstacle(self) or obstacle(self, name):
            return None
        (dim, channels), values = _channels(self, name) or (0, None), self.shira_weight[name]
        base: Any = self.base_layer
        weight, bias = base.weight.detach(), base.bias
        if channels is None or (bias is not None and bias.requires_grad):
            return None
        # float32 values on a half-precision base are the library's default.
        mixed = values.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
        if x.dtype != weight.dtype or not (values.dtype == weight.dtype or mixed):
            return None
        if not x.device == weight.device == channels.device:
            return None
        shape = (-1, self.in_features) if dim == 0 else (self.out_features, -1)
        trained = weight.index_select(dim, channels) + (values * self.scaling[name]).view(shape)
        return channel_linear(x, weight.clone(), bias, channels, trained, dim=dim, impl=self.fused_impl)


def describe(layer: Any, name: str) -> str:
    """What is computed in one call."""
    dim, channels = _channels(layer, name) or (0, ())
    return f"SHiRA, {len(channels)} {('rows', 'columns')[dim]} of {layer.out_features} x {layer.in_features}"
