"""The tuner layers of the `peft` library: which are swapped, and why each of the others is not.

A module of this package for each method that is: `LIBRARY`, the layer's class there; `HOLDER`, its attribute with an
entry per adapter; `FusedLayer`, which stands in front of that class; `layer_obstacle`, `obstacle` and `describe`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from petl_kernels.integrations._swap import fused_class, original_class
from petl_kernels.integrations.peft import ia3, ln_tuning, lora, shira, vera
from petl_kernels.integrations.report import FuseReport

_METHODS: dict[type, ModuleType] = {method.LIBRARY: method for method in (lora, ia3, ln_tuning, vera, shira)}

# Why a tuner's layers stay as they are, by its folder in `peft.tuners`.
_REASONS = {
    "lora": "of LoRA's layers only Linear, not quantised and not derived from, is fused",
    "ia3": "of (IA)^3's layers only Linear, not quantised and not derived from, is fused",
    "adalora": "a learned diagonal between its projections, which the op does not have",
    "trainable_tokens": "rows put into an embedding: an index, not projections",
    "oft": "it rotates the input of the base layer and adds nothing to its output",
    "boft": "it multiplies the weight itself",
    "hra": "it multiplies the weight itself",
    "loha": "its update is an elementwise product of matrices of the weight's size",
    "lokr": "its update is a Kronecker product",
    "fourierft": "its update is a Fourier transform of the weight's size",
    "c3a": "block-circular convolutions by FFT",
    "road": "an elementwise rotation, which torch.compile does in one pass already",
}


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every tuner layer of the model into the report, those of known methods by adapter; nothing is changed."""
    for layer_name, layer in _layers(model):
        method = _METHODS.get(original_class(layer))
        if method is None:
            report.skipped[layer_name] = _reason(layer)
            continue
        obstacle = method.layer_obstacle(layer)
        for name in getattr(layer, method.HOLDER):
            reason = obstacle or method.obstacle(layer, name)
            if reason is None:
                already = ", already fused" if isinstance(layer, method.FusedLayer) else ""
                report.fused[f"{layer_name}[{name}]"] = method.describe(layer, name) + already
            else:
                report.skipped[f"{layer_name}[{name}]"] = reason


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every layer of a known method that holds adapters and whose base layer allows it."""
    for _, layer in _layers(model):
        method = _METHODS.get(original_class(layer))
        if method is not None and len(getattr(layer, method.HOLDER)) > 0 and method.layer_obstacle(layer) is None:
            layer.__class__ = fused_class(method.FusedLayer, original_class(layer))
            layer.fused_impl = impl


def _reason(layer: Any) -> str:
    """Why this layer, of no known method, keeps the library's own path."""
    modules = (base.__module__.split(".") for base in type(layer).__mro__)
    tuner = next((m[2] for m in modules if m[:2] == ["peft", "tuners"] and len(m) > 3), "")
    return f"{type(layer).__name__}: {_REASONS.get(tuner, 'petl_kernels has no op for this method')}"
