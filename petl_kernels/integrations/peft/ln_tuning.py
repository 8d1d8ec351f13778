"""LN tuning: the trained copy of a layer norm, by `layer_norm` where that is known to be faster.

"auto" takes the op from 2^23 elements up in fp32 and from 2^18 in other dtypes; smaller calls stay PyTorch's own.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn

from petl_kernels.integrations._swap import observed
from petl_kernels.integrations.peft import _tuner
from petl_kernels.ops.layer_norm import OP, layer_norm

LIBRARY = LNTuningLayer
HOLDER = "ln_tuning_layers"


def layer_obstacle(layer: Any) -> str | None:
    """Why no adapter of this layer can run fused, or None."""
    return "its own forward is replaced" if "forward" in layer.__dict__ else None


def obstacle(layer: Any, name: str) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    norm = layer.ln_tuning_layers[name]
    if type(norm) is not nn.LayerNorm:
        return f"its norm is {type(norm).__name__}, not nn.LayerNorm"
    if len(norm.normalized_shape) != 1:
        return f"its norm is over {len(norm.normalized_shape)} dimensions"
    if not all(p is None or _tuner.plain(p) for p in (norm.weight, norm.bias)):
        return "its weights are not plain tensors"
    return "a hook or a replaced forward on its LayerNorm" if observed(norm) else None


class FusedLayer(_tuner.FusedTuner, LNTuningLayer):
    """In front of the library's class: the same forward with one call of the op where one plain adapter is active."""

    def _fused(self, x: Tensor) -> Tensor | None:
        name = _tuner.lone_adapter(self, HOLDER)
        if name is None or len(self.active_adapters) > 1 or layer_obstacle(self) or obstacle(self, name):
            return None
        norm: Any = self.ln_tuning_layers[name]
        dtypes = {p.dtype for p in norm._parameters.values() if p is not None}
        if x.shape[-1:] != norm.normalized_shape or dtypes - {x.dtype}:
            return None
        call = (x, norm.weight, norm.bias, norm.eps)
        impl = _tuner.chosen(OP, self.fused_impl, *call)
        return None if impl is None else layer_norm(*call, impl=impl)


def describe(layer: Any, name: str) -> str:
    """What is computed in one call."""
    (size,) = layer.ln_tuning_layers[name].normalized_shape
    return f"LayerNorm, {size}"
