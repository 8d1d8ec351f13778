"""LoRA and (IA)^3 of the `adapters` library: each linear that can hold some is swapped.

With A [r, d_in], B [d_out, r] and l [d_out] trained, and g in [0, 1] a factor of the sample, the library computes

    LoRA:          base(x) + (x A^T B^T) s            (IA)^3:   base(x) * (l s)
    gated LoRA:    base(x) + (x A^T B^T) g(x)

and in GPT-2's linear for query, key and value at once (`LoRAMergedLinear`) the same for each of the three that has an
adapter, by a grouped convolution and a copy at a mask of channels. There B becomes block-diagonal, [3 d, n r]: more
arithmetic of an r that is small, and one pass over the output. One call of `bottleneck_adapter` without a nonlinearity,
or of `channel_scale`, computes what follows base(x).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from adapters.methods.lora import IA3, LoRA, LoRALayer, LoRALinearTorch, LoRAMergedLinear
from torch import Tensor, nn

from petl_kernels.integrations._swap import Fused, fused_class, observed, original_class
from petl_kernels.integrations.adapters._setup import gate, lone_name
from petl_kernels.integrations.report import FuseReport
from petl_kernels.ops._validate import autocast_enabled
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter
from petl_kernels.ops.channel_scale import channel_scale

_REASONS = {
    "Vera": "its vectors are dense matrices, whose product with the projections it forms at every call",
    "MTLLoRA": "several up-projections, mixed by learned weights",
}


def _layer_obstacle(layer: Any) -> str | None:
    """Why nothing at this linear can run fused, or None."""
    original = original_class(layer)
    if original not in _FUSED:
        return f"its linear is a {original.__name__}, quantised or of a class of its own"
    return "its linear's own forward is replaced" if "forward" in layer.__dict__ else None


def _obstacle(layer: Any, adapter: Any) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    kind = type(adapter)
    if kind is not LoRA and kind is not IA3:
        return f"{kind.__name__}: {_REASONS.get(kind.__name__, 'a class of its own')}"
    if adapter.use_dora:
        return "DoRA: it normalises the columns of the whole weight at every call"
    if type(adapter.scaling) not in (int, float):
        return f"its scaling is {type(adapter.scaling).__name__}, not a number"
    if isinstance(layer, LoRAMergedLinear):
        if adapter.use_gating:
            return "a gate for each of query, key and value in one linear"
        if not any(adapter.enable_lora):
            return "neither of query nor of key nor of value"
    if kind is IA3 and adapter.use_gating:
        return "gated: a factor for each sample and channel"
    for parameter in adapter.parameters():
        if type(parameter) is not nn.Parameter:
            return f"its weights are {type(parameter).__name__}, not plain tensors"
    dropout = adapter.__dict__.get("lora_dropout") or adapter._modules.get("lora_dropout")
    library = isinstance(dropout, FunctionType) and dropout.__module__ == LoRA.__module__  # its own `lambda x: x`
    if kind is LoRA and not library and type(dropout) is not nn.Dropout:
        return f"its dropout is {type(dropout).__name__}, not nn.Dropout"
    for module in adapter.modules():
        if observed(module):
            return f"a hook or a replaced forward on its {type(module).__name__}"
    return None


def _random_now(adapter: Any) -> bool:
    """Whether dropout of x is at work, which the op does not have."""
    dropout = adapter._modules.get("lora_dropout")
    return dropout is not None and dropout.training and dropout.p > 0


class _FusedLinear(Fused, LoRALayer):
    """In front of a linear's class: the same forward with one call of an op where a single adapter is active."""

    def forward(self, x: Tensor) -> Tensor:
        adapter = self._lone_adapter(x)
        if adapter is None:
            return super().forward(x)
        result = F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        if type(adapter) is IA3:
            vector = self._vector(adapter)
            factors = vector if adapter.scaling == 1 else vector * adapter.scaling
            return channel_scale(result, factors, impl=self.fused_impl)
        gated = adapter.use_gating
        branch = bottleneck_adapter(
            x,
            adapter.lora_A,
            None,
            self._up(adapter),
            None,
            residual=None if gated else result,
            activation="identity",
            scale=1.0 if gated else adapter.scaling,
            impl=self.fused_impl,
        )
        return result + branch * gate(adapter, x) if gated else branch

    def _lone_adapter(self, x: Tensor) -> Any:
        """The adapter that alone acts here in this call and may run fused, or None."""
        name = None if self.merged else lone_name(self)
        adapter = None if name is None else self.loras._modules.get(name)
        if adapter is None or _layer_obstacle(self) or _obstacle(self, adapter) or _random_now(adapter):
            return None
        dtypes = {p.dtype for p in (x, self.weight, *adapter.parameters())}
        if type(adapter) is IA3:  # under autocast the library's result is of the vector's dtype, float32
            return adapter if x.dim() == 3 and len(dtypes) == 1 and not autocast_enabled(x) else None
        if adapter.use_gating and x.dim() != 3:
            return None
        mixed = len(dtypes) > 1 and (torch.float64 in dtypes or not autocast_enabled(x))
        return None if mixed else adapter

    def _up(self, adapter: Any) -> Tensor:
        return adapter.lora_B

    def _vector(self, adapter: Any) -> Tensor:
        return adapter.lora_B.view(-1)


class _FusedMerged(_FusedLinear, LoRAMergedLinear):
    """The same for query, key and value in one linear."""

    def _up(self, adapter: Any) -> Tensor:
        size = self.out_features // 3
        blocks = iter(adapter.lora_B.split(size))
        none = adapter.lora_B.new_empty(size, 0)
        return torch.block_diag(*(next(blocks) if enabled else none for enabled in adapter.enable_lora))

    def _vector(self, adapter: Any) -> Tensor:
        size = self.out_features // 3
        parts = iter(adapter.lora_B.view(-1).split(size))
        ones = adapter.lora_B.new_ones(size)
        return torch.cat([next(parts) if enabled else ones for enabled in adapter.enable_lora])


_FUSED: dict[type, type] = {LoRALinearTorch: _FusedLinear, LoRAMergedLinear: _FusedMerged}


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer)]


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every LoRA and (IA)^3 of the model into the report; nothing is changed."""
    for layer_name, layer in _layers(model):
        for name, adapter in layer.loras.items():
            full_name = ".".join(filter(None, (layer_name, "loras", name)))
            reason = _layer_obstacle(layer) or _obstacle(layer, adapter)
            if reason is None:
                already = ", already fused" if isinstance(layer, _FusedLinear) else ""
                report.fused[full_name] = _describe(layer, adapter) + already
            else:
                report.skipped[full_name] = reason


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every linear that holds adapters and whose class allows it."""
    for _, layer in _layers(model):
        if len(layer.loras) > 0 and _layer_obstacle(layer) is None:
            layer.__class__ = fused_class(_FUSED[original_class(layer)], original_class(layer))
            layer.fused_impl = impl


def _describe(layer: Any, adapter: Any) -> str:
    if type(adapter) is IA3:
        return f"(IA)^3, {adapter.lora_B.numel()} factors of {layer.out_features} outputs"
    text = f"LoRA, {layer.in_features} -> {adapter.lora_A.shape[0]} -> {layer.out_features}, "
    text += "gated" if adapter.use_gating else f"scale {adapter.scaling:g}"
    p = getattr(adapter.lora_dropout, "p", 0)
    return f"{text}; not while dropout {p} is training" if p > 0 else text
