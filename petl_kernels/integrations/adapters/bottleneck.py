"""Bottleneck adapters of the `adapters` library: each place that can hold some (a `BottleneckLayer`) is swapped.

What the library computes at such a site, with h the sublayer's output, r the residual stream, LN the backbone's layer
norm or None, and core(x) = scaling * up(act(down(x))):

    Adapter:          x, s = pre_forward(h, r, LN)     y = core(x) + s
    ParallelAdapter:  x = r                            y = core(x) + h
    gated:            core(x) times a factor of the sample, the mean over its positions of sigmoid(gate(x))
    both:             LN(y + r), y + r or y            (post_forward)

Where one plain adapter is active, y is one call of `bottleneck_adapter`, or LN(y + r) one of `adapter_norm`, and the
walk through compositions and states, which costs more host time than the arithmetic of small models, is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from adapters.composition import Fuse
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import Adapter, ParallelAdapter
from torch import Tensor, nn
from transformers.activations import ACT2FN

from petl_kernels.integrations._swap import Fused, fused_class, observed, original_class
from petl_kernels.integrations.adapters._setup import gate, lone_name
from petl_kernels.integrations.report import FuseReport
from petl_kernels.ops._validate import autocast_enabled
from petl_kernels.ops.adapter_norm import OP as ADAPTER_NORM
from petl_kernels.ops.adapter_norm import adapter_norm
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter

# The library's names of the nonlinearities that the op has; several implementations of one formula are one entry.
_NAMES = {
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "silu": ("silu", "swish"),
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid",),
    "leaky_relu": ("leaky_relu",),
    "identity": ("linear",),
}
_ACTIVATIONS: dict[Any, str] = {type(ACT2FN[n]): ours for ours, names in _NAMES.items() for n in names if n in ACT2FN}
_ACTIVATIONS |= {nn.Identity: "identity"}


def _activation(f: Any) -> str | None:
    """The op's name for the nonlinearity `f`, or None."""
    if f is F.leaky_relu:
        return "leaky_relu"
    name = _ACTIVATIONS.get(type(f))
    return None if name == "leaky_relu" and f.negative_slope != 0.01 else name


def _obstacle(adapter: Any) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    if type(adapter) is not Adapter and type(adapter) is not ParallelAdapter:
        return f"{type(adapter).__name__} is a class of its own, not the library's Adapter or ParallelAdapter"
    parts = adapter._modules
    *_, down, activation = parts["adapter_down"]._modules.values()
    up = parts["adapter_up"]
    for linear in (down, up):
        if type(linear) is not nn.Linear:
            return f"its projections are {type(linear).__name__}, not nn.Linear"
        if type(linear.weight) is not nn.Parameter and type(linear.weight) is not Tensor:
            return f"its weights are {type(linear.weight).__name__}, not plain tensors"
    if _activation(activation.f) is None:
        return f"the op does not have the activation {activation.f}"
    inner = activation.f if isinstance(activation.f, nn.Module) else activation
    for module in (adapter, parts["adapter_down"], down, activation, inner, up, parts["dropout"], parts.get("gate")):
        if module is not None and observed(module):
            return f"a hook or a replaced forward on its {type(module).__name__}"
    return None


def _random_now(adapter: Any) -> bool:
    """Whether dropout or stochastic depth is at work, of which the op would draw other numbers."""
    parts = adapter._modules
    dropout, drop_path = parts["dropout"], parts.get("DropPath")
    if dropout.training and dropout.p > 0:
        return True
    return drop_path is not None and drop_path.training and type(adapter) is Adapter


def _dtypes_fit(x: Tensor, weight: Tensor, residual: Tensor | None, scaling: float | Tensor) -> bool:
    """Whether op and library agree on the dtype of the result: all alike, or mixed by autocast."""
    dtypes = {x.dtype, weight.dtype}
    if residual is not None:
        dtypes.add(residual.dtype)
    if isinstance(scaling, Tensor):
        dtypes.add(scaling.dtype)
    return len(dtypes) == 1 or (torch.float64 not in dtypes and autocast_enabled(x))


def _core(adapter: Any, x: Tensor, residual: Tensor | None, impl: str | None) -> Tensor:
    """`residual` plus what the adapter adds to it, the adapter's own layer norms included."""
    parts = adapter._modules
    *_, down, activation = parts["adapter_down"]._modules.values()
    up, scaling, norm = parts["adapter_up"], adapter.scaling, parts.get("adapter_norm_after")
    gated = adapter.use_gating
    if not _dtypes_fit(x, down.weight, residual, scaling) or (gated and x.dim() != 3):
        y = adapter(x, residual_input=residual)[0]
        return y if residual is None or type(adapter) is Adapter else y + residual
    factor = gate(adapter, x) if gated else None
    if adapter.add_layer_norm_before:
        x = parts["adapter_norm_before"](x)
    late = norm is not None and not (adapter.adapter_residual_before_ln and type(adapter) is Adapter)
    added = None if late else residual
    if isinstance(scaling, Tensor) and added is not None:
        # Under autocast a learned scaling stays float32, and with it the product and the sum.
        added = added.to(torch.promote_types(added.dtype, scaling.dtype))
    y = bottleneck_adapter(
        x,
        down.weight,
        down.bias,
        up.weight,
        up.bias,
        residual=added,
        activation=_activation(activation.f) or "",
        scale=scaling,
        gate=factor,
        impl=impl,
    )
    if isinstance(scaling, Tensor):
        y = y.to(torch.promote_types(y.dtype, scaling.dtype))
    if norm is not None:
        y = norm(y)
    return y + residual if late and residual is not None else y


# Elements from which on one call for a whole site is faster than the adapter's with torch's sum and norm behind it:
# forward + backward 4.8 ms against 5.9 at 4096 x 384, 2.25 against 2.19 at 1024 x 768 (fp32, r = 48, 2 AVX-512 cores).
_WORTHWHILE = 1 << 20


def _absorbs_norm(adapter: Any, x: Tensor, added: Tensor, r: Tensor | None, norm: Any, impl: str | None) -> bool:
    """Whether LN(added + core(x) + r), the end of a site, is one call of `adapter_norm`."""
    if not adapter.original_ln_after or r is None or type(norm) is not nn.LayerNorm or observed(norm):
        return False
    if adapter.add_layer_norm_before or adapter.add_layer_norm_after or adapter.use_gating:
        return False
    if len(norm.normalized_shape) != 1:
        return False
    parts = adapter._modules
    down, up = parts["adapter_down"]._modules["0"], parts["adapter_up"]
    requested = ADAPTER_NORM.requested(impl)
    # To a compiler a size may be a symbol, and a bound on it would become a condition of the graph.
    if not requested and (torch.compiler.is_compiling() or x.numel() < _WORTHWHILE):
        return False
    if requested and ADAPTER_NORM.unsupported(requested, x, r, added, down.weight, down.bias, up.weight):
        return False  # too wide a row, and the adapter by itself may still be within what was asked for
    tensors = [x, added, r, up.weight, norm.weight, norm.bias, adapter.scaling]
    # Under autocast the library's sum has dtypes that depend on the scaling; that is left to the two-step form.
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    return len(dtypes) == 1 and not autocast_enabled(x) and added.shape == r.shape == x.shape


def _whole_site(adapter: Any, x: Tensor, added: Tensor, r: Tensor, norm: nn.LayerNorm, impl: str | None) -> Tensor:
    """`LN(added + core(x) + r)` in one call."""
    parts = adapter._modules
    *_, down, activation = parts["adapter_down"]._modules.values()
    up = parts["adapter_up"]
    return adapter_norm(
        x,
        r,
        down.weight,
        down.bias,
        up.weight,
        up.bias,
        norm.weight,
        norm.bias,
        hidden=added,
        eps=norm.eps,
        activation=_activation(activation.f) or "",
        scale=adapter.scaling,
        impl=impl,
    )


def _contains_fuse(setup: Any) -> bool:
    return isinstance(setup, Fuse) or (not isinstance(setup, str) and any(_contains_fuse(s) for s in setup or ()))


class _FusedSite(Fused, BottleneckLayer):
    """In front of a site's own class: the same forward with one call of the op where a plain adapter is active."""

    def bottleneck_layer_forward(self, hidden_states: Tensor, residual_input: Any, layer_norm: Any) -> Tensor:
        adapter = self._lone_adapter(hidden_states, residual_input)
        if adapter is None:
            return super().bottleneck_layer_forward(hidden_states, residual_input, layer_norm)
        if type(adapter) is ParallelAdapter:
            x, added = residual_input, hidden_states
        else:
            x, _, added = adapter.pre_forward(hidden_states, residual_input, layer_norm)
        if _absorbs_norm(adapter, x, added, residual_input, layer_norm, self.fused_impl):
            if x is residual_input:  # both are terms, and x as the first of them is read once
                return _whole_site(adapter, x, x, added, layer_norm, self.fused_impl)
            return _whole_site(adapter, x, added, residual_input, layer_norm, self.fused_impl)
        y = _core(adapter, x, added, self.fused_impl)
        return Adapter.post_forward(adapter, y, hidden_states, residual_input, layer_norm)

    def _lone_adapter(self, hidden_states: Tensor, residual_input: Tensor | None) -> Any:
        """The adapter that alone acts here in this call and may run fused, or None."""
        name = lone_name(self)
        adapter = None if name is None else self.adapters._modules.get(name)
        if residual_input is None:
            if type(adapter) is ParallelAdapter:
                return None  # the library's error
        elif residual_input.shape != hidden_states.shape:
            return None  # one of them is still to be repeated for parallel composition
        return None if adapter is None or _obstacle(adapter) or _random_now(adapter) else adapter

    def compose_single(self, adapter_setup: str, state: BottleneckState, lvl: int = 0) -> BottleneckState:
        """One adapter inside a composition: its core fused, unless somebody reads what the op does not form."""
        adapter = self.adapters[adapter_setup]
        context = ForwardContext.get_context()
        gating = context is not None and context.output_adapter_gating_scores
        # AdapterFusion attends over the up-projections before the residual.
        if gating or _contains_fuse(self.get_active_setup()) or _obstacle(adapter) or _random_now(adapter):
            return super().compose_single(adapter_setup, state, lvl)
        residual = state.adapter_residual if type(adapter) is Adapter else None
        y = _core(adapter, state.hidden_states, residual, self.fused_impl)
        return state._replace(hidden_states=y, bottleneck_up=None, last=adapter_setup)


def _sites(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BottleneckLayer)]


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every bottleneck adapter of the model into the report; nothing is changed."""
    seen = set()
    for site_name, site in _sites(model):
        for name, adapter in getattr(site, "adapters", {}).items():
            seen.add(adapter)
            full_name = ".".join(filter(None, (site_name, "adapters", name)))
            reason = _site_obstacle(original_class(site)) or _obstacle(adapter)
            if reason is None:
                report.fused[full_name] = _describe(adapter) + (", already fused" if _is_fused(site) else "")
            else:
                report.skipped[full_name] = reason
    for name, module in model.named_modules():
        if isinstance(module, Adapter) and module not in seen:
            report.skipped[name] = "not inside a BottleneckLayer: its caller may read what the op does not form"


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every site that holds adapters and whose forward is the library's own."""
    for _, site in _sites(model):
        original = original_class(site)
        # An empty site has nothing to gain, and its forward (8 us of host time) would pay 1.5 us for looking.
        if len(getattr(site, "adapters", ())) > 0 and _site_obstacle(original) is None:
            site.__class__ = fused_class(_FusedSite, original)
            site.fused_impl = impl


def _is_fused(site: Any) -> bool:
    return isinstance(site, _FusedSite)


def _site_obstacle(site: type) -> str | None:
    for method in ("bottleneck_layer_forward", "compose_single"):
        if getattr(site, method) is not getattr(BottleneckLayer, method):
            return f"{site.__name__} has a {method} of its own"
    return None


def _describe(adapter: Any) -> str:
    *_, down, activation = adapter.adapter_down
    form = "sequential" if type(adapter) is Adapter else "parallel"
    scaling = adapter.scaling
    scale = f"learned [{scaling.numel()}]" if isinstance(scaling, Tensor) else str(scaling)
    text = f"{form}, {down.in_features} -> {down.out_features}, {_activation(activation.f)}, scale {scale}"
    text += ", gated" if adapter.use_gating else ""
    if adapter.dropout.p > 0:
        text += f"; not while dropout {adapter.dropout.p} is training"
    elif "DropPath" in adapter._modules and form == "sequential":
        text += "; not while stochastic depth is training"
    return text
