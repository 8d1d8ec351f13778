"""LoRA: all that follows the frozen linear is one call of `bottleneck_adapter` without a nonlinearity.

    result = base(x);    y = result + B(A(dropout(x'))) s;    y in the dtype of result

with A and B bias-free projections (B may have a bias), s a number and x' the input in the adapter's dtype.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from petl_kernels.integrations._swap import observed
from petl_kernels.integrations.peft import _tuner

LIBRARY = Linear
HOLDER = "lora_A"
layer_obstacle = _tuner.base_obstacle


def obstacle(layer: Any, name: str) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"a variant of LoRA: {type(variant).__name__}"
    down, up, dropout, scaling = _parts(layer, name)
    for linear in (down, up):
        if type(linear) is not nn.Linear:
            return f"its projections are {type(linear).__name__}, not nn.Linear"
        if not _tuner.plain(linear.weight):
            return f"its weights are {type(linear.weight).__name__}, not plain tensors"
        if observed(linear):
            return "a hook or a replaced forward on its Linear"
    if not isinstance(scaling, (int, float)) and not (type(scaling) is Tensor and scaling.dim() == 0):
        return f"its scaling is {type(scaling).__name__}, not a number"
    return _tuner.dropout_obstacle(dropout)


def _parts(layer: Any, name: str) -> tuple[Any, Any, Any, Any]:
    """A, B, dropout and scaling of an adapter."""
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    return down, up, modules["lora_dropout"]._modules[name], layer.scaling[name]


class FusedLayer(_tuner.FusedTuner, Linear):
    """In front of the library's class: the same forward with one call of the op where one plain adapter is active."""

    def _fused(self, x: Tensor) -> Tensor | None:
        name = _tuner.lone_adapter(self, HOLDER) if _tuner.worthwhile(self, x) else None
        if name is None or layer_obstacle(self) or obstacle(self, name):
            return None
        down, up, dropout, scaling = _parts(self, name)
        if _tuner.random_now(dropout):
            return None
        return _tuner.low_rank(self, x, (down.weight, down.bias, up.weight, up.bias), scaling)


def describe(layer: Any, name: str) -> str:
    """What is computed in one call."""
    down, up, dropout, scaling = _parts(layer, name)
    text = f"LoRA, {down.in_features} -> {down.out_features} -> {up.out_features}, scale {float(scaling):g}"
    return _tuner.except_in_training(text, dropout)
