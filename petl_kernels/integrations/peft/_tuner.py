"""What the swapped tuner layers of `peft` share: who is active, the layer under them, low-rank branches in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl_kernels.integrations._swap import Fused, observed
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._validate import autocast, autocast_enabled
from petl_kernels.ops.bottleneck_adapter import OP, bottleneck_adapter

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts: not float64, and no 8-bit format
# Elements of input and output from which "auto" fuses a low-rank branch. On 2 cores with AVX-512, fp32, r = 8 and 64,
# forward + backward with a frozen base runs at 0.7 to 0.98 of the library's speed at 2^15 and below, where the host's
# time and the packing of A and B decide, at 0.92 to 1.2 from 2^16 to 2^17, and at 1.2 to 1.7 for 4096 x 768 (1.9 and
# more in bf16).
_LEAST = 2**17


class FusedTuner(Fused):
    """In front of a tuner layer's class: its forward by `_fused`, which returns None where the library has to run."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]

    def _fused(self, x: Tensor) -> Tensor | None:
        raise NotImplementedError


def lone_adapter(layer: Any, holder: str) -> str | None:
    """The adapter that alone acts in this layer now, or None; `holder` is the attribute with an entry for each."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    here = getattr(layer, holder)
    active = [name for name in layer.active_adapters if name in here]
    return active[0] if len(active) == 1 else None


def base_obstacle(layer: Any) -> str | None:
    """Why no adapter over this linear can run fused, or None."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is {type(base).__name__}, not nn.Linear or Conv1D"
    if "forward" in layer.__dict__:
        return "its own forward is replaced"
    if observed(base):  # whose result may then be anything
        return "a hook or a replaced forward on its base layer"
    return None


def plain(tensor: Any) -> bool:
    """Whether the tensor is what it looks like: no quantised or sharded one."""
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def chosen(op: Op, impl: str | None, *call: Any) -> str | None:
    """The implementation for a call of `op`; None where nobody asked and "auto" takes PyTorch, as the library does."""
    impl = op.requested(impl)
    if impl is not None:
        return impl
    impl = op.select(None, *call)
    return None if impl == REFERENCE else impl


def random_now(dropout: Any) -> bool:
    """Whether dropout of x is at work, which the op does not have."""
    return dropout.training and type(dropout) is nn.Dropout and dropout.p > 0


def dropout_obstacle(dropout: Any) -> str | None:
    """Why this dropout could be more than one, or None."""
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is {type(dropout).__name__}, not nn.Dropout"
    return f"a hook or a replaced forward on its {type(dropout).__name__}" if observed(dropout) else None


def except_in_training(text: str, dropout: Any) -> str:
    """A description, with its exception where the dropout has one."""
    p = getattr(dropout, "p", 0)
    return f"{text}; not while dropout {p} is training" if p > 0 else text


def worthwhile(layer: Any, x: Tensor) -> bool:
    """Whether a low-rank branch of this size gains by the op, or was asked to run on it."""
    # A compiled call has no host cost, and a bound on its size would be a guard on the batch.
    if torch.compiler.is_compiling() or OP.requested(layer.fused_impl) is not None:
        return True
    return x.numel() * (layer.in_features + layer.out_features) >= _LEAST * layer.in_features


def low_rank(layer: Any, x: Tensor, weights: Weights, scaling: Any) -> Tensor | None:
    """`base(x) + scaling B(A(x))` in the dtype of base(x), or None where the library has to compute it.

    Args:
        layer: the tuner layer over a linear.
        x: its input.
        weights: A [r, d_in], its bias, B [d_out, r], its bias.
        scaling: a number, a tensor of none or of d_out elements.
    """
    if not _tensors_fit(x, weights, scaling, getattr(layer, "cast_input_dtype_enabled", True)):
        return None
    # An x narrower than the adapter competes with the library's products in the adapter's dtype, float32. In the
    # residual's place x itself is looked at too: a tangent or a wrapper is what no kernel takes.
    widened = x.dtype is not weights[0].dtype and not autocast_enabled(x)
    computed = autocast(x.new_empty(0, dtype=weights[0].dtype if widened else x.dtype))
    impl = chosen(OP, layer.fused_impl, computed, *weights, x, scaling, None, None, 0.0, "identity")
    if impl is None:
        return None
    result = layer.base_layer(x)
    if impl == REFERENCE and widened:
        x = x.to(weights[0].dtype)  # as the library does; the reference would round the weights to x's dtype
    options: dict[str, Any] = dict(residual=result, activation="identity", scale=scaling, impl=impl)
    return bottleneck_adapter(x, *weights, **options).to(result.dtype)


def _tensors_fit(x: Tensor, weights: Weights, scaling: Any, widens: bool) -> bool:
    """Whether op and library agree on what these dtypes give, and the tensors are in one place."""
    dtype, own, device = x.dtype, weights[0].dtype, x.device
    for p in weights:
        if p is not None and (p.dtype is not own or p.device != device):
            return False
    apart = isinstance(scaling, Tensor) and scaling.dtype is not own
    if apart and (scaling.dtype != torch.float32 or torch.float64 in (dtype, own)):
        return False
    if dtype is own:
        return dtype in AUTOCAST or dtype == torch.float64
    if dtype not in AUTOCAST or own not in AUTOCAST:
        return False
    # float32 adapters on a half-precision base are the library's default, and there it widens x.
    return (own == torch.float32 and widens) or autocast_enabled(x)
