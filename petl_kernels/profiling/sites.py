"""Where the adapters of a model are, and the model without them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import petl_kernels.nn
from petl_kernels._names import match
from petl_kernels.integrations import patterns
from petl_kernels.methods.attach import _attached

_OWN = tuple(getattr(petl_kernels.nn, name) for name in petl_kernels.nn.__all__)
_OWN_LAYERS = tuple(kind for kind in _OWN if isinstance(kind, type) and kind is not petl_kernels.nn.LayerNorm)


@dataclass(frozen=True)
class Site:
    """A module that holds adapters, and the method that runs them.

    Attributes:
        kind: "petl_kernels", "adapters", "peft", "hand-written" or "named".
    """

    name: str
    module: nn.Module
    method: str
    kind: str


def find_sites(model: nn.Module, names: Sequence[str] = ()) -> list[Site]:
    """The outermost modules with adapters: layers of `petl_kernels.nn`, sites of `adapters` and `peft`, hand-written
    adapters as `fuse` recognises them, or those of the given names (glob patterns).

    Raises:
        ValueError: a pattern that matches nothing.
    """
    if names:
        modules = {name: module for name, module in model.named_modules() if name}
        found = [Site(name, modules[name], "forward", "named") for name in match("profile", "adapters", names, modules)]
    else:
        by_hand = {name for name, _, _ in patterns._candidates(model)}
        found = [site for name, module in model.named_modules() if (site := _site(name, module, by_hand)) is not None]
    outer: list[Site] = []
    for site in sorted(found, key=lambda site: site.name.count(".")):
        if not any(site.name.startswith(f"{other.name}.") for other in outer):
            outer.append(site)
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    return sorted(outer, key=lambda site: order[site.name])


def _site(name: str, module: nn.Module, by_hand: set[str]) -> Site | None:
    if isinstance(module, _OWN_LAYERS):
        return Site(name, module, "forward", "petl_kernels")
    if name in by_hand:
        return Site(name, module, "forward", "hand-written")
    if "adapters" in sys.modules:
        from adapters.methods.adapter_layer_base import AdapterLayerBase
        from adapters.methods.bottleneck import BottleneckLayer

        if isinstance(module, AdapterLayerBase) and len(module.adapter_modules):
            method = "bottleneck_layer_forward" if isinstance(module, BottleneckLayer) else "forward"
            return Site(name, module, method, "adapters")
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(module, BaseTunerLayer):
            return Site(name, module, "forward", "peft")
    return None


def take_out(model: nn.Module, adapted: nn.Module, names: Sequence[str] = ()) -> str | None:
    """Take the adapters out of a model and freeze what is left, so that its step is the least any adapters could cost.

    The gradient still goes back as far as it has to in the model with adapters: to the first place where something
    trains.

    Args:
        model: another copy of `adapted`, changed in place.
        adapted: the model with its adapters.
        names: as of `find_sites`.

    Returns:
        Why that is not possible, or None.
    """
    starts = {site.name for site in find_sites(adapted, names)}
    attached = [(name, part) for name, part in model.named_modules() if part in _attached]
    for name, part in attached:
        starts |= {f"{name}.{each}".lstrip(".") for each in _attached[part].inserted}
        _attached[part].detach()
    sites = find_sites(model, names if not attached else ())
    if not attached and not sites:
        return "it has no adapters of a known kind: name their modules (--adapters), or let build take adapters=False"
    for site in sites:
        if (reason := _silence(site.module, site)) is not None:
            return f"{site.name}: {reason}; let build take adapters=False"
    freeze(model, adapted, starts)
    return None


def freeze(model: nn.Module, adapted: nn.Module, places: set[str]) -> None:
    """Freeze a model without adapters; its gradient goes back to the first module that was a place of adapters or
    trains in `adapted`, or, where there is no such module without adapters, to the one around it."""
    model.requires_grad_(False)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        # Of a module that computes with its children: the gradient has to come to the parameter itself.
        if name in trained and any(True for _ in modules[name.rpartition(".")[0]].children()):
            p.requires_grad_(True)
    for start in places | {name.rpartition(".")[0] for name in trained}:
        while start and start not in modules:
            start = start.rpartition(".")[0]
        for method in ("forward", "bottleneck_layer_forward") if start else ():
            original = getattr(modules[start], method, None)
            if original is not None and getattr(original, "func", None) is not _started:
                setattr(modules[start], method, partial(_started, original))


def _started(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = original(*args, **kwargs)
    if not torch.is_grad_enabled() or any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(output)):
        return output
    return tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, output)


def _silence(module: Any, site: Site) -> str | None:
    """Let the module compute what it would without its adapters; why that is not known, or None."""
    if site.kind == "peft":
        module.enable_adapters(False)
    elif site.kind == "adapters":
        module.get_active_setup = _no_setup
    elif site.kind == "hand-written":
        bare = any(p is not None and p.residual == "none" for p in (patterns._find(module) or {}).values())
        module.forward = _nothing if bare else _pass
    elif issubclass(type(module), petl_kernels.nn.BottleneckAdapter):
        module.forward = _nothing_or_residual if module.form == "parallel" else _pass
    elif isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "in_features"):
        module.forward = partial(_frozen_linear, module)
    else:
        return f"what a {type(module).__name__} computes without its adapter is not known"
    return None


def _no_setup() -> None:
    return None


def _frozen_linear(module: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def _pass(x: Tensor, residual: Tensor | None = None) -> Tensor:
    return x if residual is None else residual


def _nothing(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


def _nothing_or_residual(x: Tensor, residual: Tensor | None = None) -> Tensor:
    return _nothing(x) if residual is None else residual
