"""LoRA of the `peft` library: each `lora.Linear` is swapped; every other tuner layer is named in the report, with why.

What the library computes there, with A and B bias-free projections (B may have a bias), s a number and x' the input
in the adapter's dtype:

    result = base(x);    y = result + B(A(dropout(x'))) s    for each active adapter;    y in the dtype of result

Where one plain adapter is active, all that follows base(x) is one call of `bottleneck_adapter` without a nonlinearity.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petl_kernels.integrations._swap import Fused, fused_class, observed, original_class
from petl_kernels.integrations.report import FuseReport
from petl_kernels.ops._op import REFERENCE
from petl_kernels.ops._validate import autocast, autocast_enabled
from petl_kernels.ops.bottleneck_adapter import OP, bottleneck_adapter

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts: not float64, and no 8-bit format
_Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
# Elements of input and output from which "auto" fuses. On 2 cores with AVX-512, fp32, r = 8 and 64, forward + backward
# with a frozen base runs at 0.7 to 0.98 of the library's speed at 2^15 and below, where the host's time and the packing
# of A and B decide, at 0.92 to 1.2 from 2^16 to 2^17, and at 1.2 to 1.7 for 4096 x 768 (1.9 and more in bf16).
_LEAST = 2**17

# Why a tuner's layers stay as they are, by its folder in `peft.tuners`.
_REASONS = {
    "ia3": "a product with a vector, not swapped: petl_kernels.nn.IA3Linear has its fused backward",
    "ln_tuning": "a plain LayerNorm already",
    "lora": "of LoRA's layers only Linear, not quantised and not derived from, is fused",
    "adalora": "a learned diagonal between its projections, which the op does not have",
    "vera": "a learned vector between its projections: put into A, it would cost the dense gradient of a frozen matrix",
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


def _layer_obstacle(layer: Any) -> str | None:
    """Why no adapter of this `lora.Linear` can run fused, or None."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}, not nn.Linear"
    if layer.fan_in_fan_out:
        return "its base weight is stored transposed (fan_in_fan_out)"
    if "forward" in layer.__dict__:
        return "its own forward is replaced"
    if observed(base):  # whose result may then be anything
        return "a hook or a replaced forward on its base layer"
    return None


def _obstacle(layer: Any, name: str) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"a variant of LoRA: {type(variant).__name__}"
    down, up, dropout, scaling = _parts(layer, name)
    for linear in (down, up):
        if type(linear) is not nn.Linear:
            return f"its projections are {type(linear).__name__}, not nn.Linear"
        if type(linear.weight) is not nn.Parameter and type(linear.weight) is not Tensor:
            return f"its weights are {type(linear.weight).__name__}, not plain tensors"
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is {type(dropout).__name__}, not nn.Dropout"
    if not isinstance(scaling, (int, float)) and not (type(scaling) is Tensor and scaling.dim() == 0):
        return f"its scaling is {type(scaling).__name__}, not a number"
    for module in (down, up, dropout):
        if observed(module):
            return f"a hook or a replaced forward on its {type(module).__name__}"
    return None


def _parts(layer: Any, name: str) -> tuple[Any, Any, Any, Any]:
    """A, B, dropout and scaling of an adapter."""
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    return down, up, modules["lora_dropout"]._modules[name], layer.scaling[name]


def _tensors_fit(x: Tensor, weights: _Weights, scaling: Any, widens: bool) -> bool:
    """Whether op and library agree on what these dtypes give, and the tensors are in one place."""
    dtype, own, device = x.dtype, weights[0].dtype, x.device
    for p in weights:
        if p is not None and (p.dtype is not own or p.device != device):
            return False
    if isinstance(scaling, Tensor) and (scaling.dtype != torch.float32 or torch.float64 in (dtype, own)):
        return False
    if dtype is own:
        return dtype in _AUTOCAST or dtype == torch.float64
    if dtype not in _AUTOCAST or own not in _AUTOCAST:
        return False
    # float32 adapters on a half-precision base are the library's default, and there it widens x.
    return (own == torch.float32 and widens) or autocast_enabled(x)


def _random_now(dropout: Any) -> bool:
    """Whether dropout is at work: the op has no random numbers of its own."""
    return dropout.training and type(dropout) is nn.Dropout and dropout.p > 0


def _large_enough(layer: Any, x: Tensor) -> bool:
    # A compiled call has no host cost, and a bound on its size would be a guard on the batch.
    sizes = layer.in_features + layer.out_features
    return torch.compiler.is_compiling() or x.numel() * sizes >= _LEAST * layer.in_features


def _implementation(x: Tensor, weights: _Weights, scaling: Any) -> str:
    """The implementation that measurement found fastest for this call, or the reference, which gains nothing."""
    # An x narrower than the adapter competes with the library's products in the adapter's dtype, float32. In the
    # residual's place x itself is looked at too: a tangent or a wrapper is what no kernel takes.
    widened = x.dtype is not weights[0].dtype and not autocast_enabled(x)
    computed = autocast(x.new_empty(0, dtype=weights[0].dtype if widened else x.dtype))
    return OP.select(None, computed, *weights, x, scaling, "identity")


class _FusedLinear(Fused, Linear):
    """In front of the library's class: the same forward with one call of the op where one plain adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y

    def _fused(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the library has to compute it."""
        impl = OP.requested(self.fused_impl)
        if impl is None and not _large_enough(self, x):
            return None
        name = self._lone_adapter()
        if name is None:
            return None
        down, up, dropout, scaling = _parts(self, name)
        weights = (down.weight, down.bias, up.weight, up.bias)
        if _random_now(dropout) or not _tensors_fit(x, weights, scaling, self.cast_input_dtype_enabled):
            return None
        if impl is None:
            impl = _implementation(x, weights, scaling)
            if impl == REFERENCE:
                return None
        result = self.base_layer(x)
        if impl == REFERENCE and x.dtype is not down.weight.dtype and not autocast_enabled(x):
            x = x.to(down.weight.dtype)  # as the library does; the reference would round the weights to x's dtype
        options: dict[str, Any] = dict(residual=result, activation="identity", scale=scaling, impl=impl)
        return bottleneck_adapter(x, *weights, **options).to(result.dtype)

    def _lone_adapter(self) -> str | None:
        """The adapter that alone acts here in this call and may run fused, or None."""
        if self._disable_adapters or self.merged_adapters:
            return None
        here = self.lora_A._modules
        active = [name for name in self.active_adapters if name in here]
        if len(active) != 1 or _layer_obstacle(self) or _obstacle(self, active[0]):
            return None
        return active[0]


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every tuner layer of the model into the report, LoRA's by adapter; nothing is changed."""
    for layer_name, layer in _layers(model):
        if original_class(layer) is not Linear:
            report.skipped[layer_name] = _reason(layer)
            continue
        obstacle = _layer_obstacle(layer)
        for name in layer.lora_A:
            reason = obstacle or _obstacle(layer, name)
            if reason is None:
                already = ", already fused" if isinstance(layer, _FusedLinear) else ""
                report.fused[f"{layer_name}[{name}]"] = _describe(layer, name) + already
            else:
                report.skipped[f"{layer_name}[{name}]"] = reason


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every `lora.Linear` that holds adapters and whose base layer allows it."""
    for _, layer in _layers(model):
        if original_class(layer) is Linear and len(layer.lora_A) > 0 and _layer_obstacle(layer) is None:
            layer.__class__ = fused_class(_FusedLinear, Linear)
            layer.fused_impl = impl


def _describe(layer: Any, name: str) -> str:
    down, up, dropout, scaling = _parts(layer, name)
    text = f"LoRA, {down.in_features} -> {down.out_features} -> {up.out_features}, scale {float(scaling):g}"
    p = getattr(dropout, "p", 0)
    return f"{text}; not while dropout {p} is training" if p > 0 else text


def _reason(layer: Any) -> str:
    """Why this layer, no `lora.Linear`, keeps the library's own path."""
    kind = type(layer).__name__
    if isinstance(layer, ShiraLayer):
        return f"{kind}: {_shira_reason(layer)}"
    modules = (base.__module__.split(".") for base in type(layer).__mro__)
    tuner = next((m[2] for m in modules if m[:2] == ["peft", "tuners"] and len(m) > 3), "")
    return f"{kind}: {_REASONS.get(tuner, 'petl_kernels has no op for this method')}"


def _shira_reason(layer: Any) -> str:
    shape = (layer.out_features, layer.in_features)
    if layer.shira_indices and all(_whole(indices, shape) for indices in layer.shira_indices.values()):
        # Not worth a swap: only a mask of the user's own is like this, and no result would survive disable or unmerge.
        return "whole rows or columns, but added to a weight that must stay; channel_linear trains them inside it"
    return "its indices are elements of the weight, not whole rows or columns"


def _whole(indices: Tensor, shape: tuple[int, int]) -> bool:
    """Whether distinct (row, column) pairs, [2, n], are all elements of some rows or of some columns."""
    rows, columns = (line.unique().numel() for line in indices)
    return indices.shape[1] in (rows * shape[1], columns * shape[0])
