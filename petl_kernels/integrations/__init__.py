"""Fused modules swapped into models that other libraries built: `fuse` and `unfuse`."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

from torch import nn

from petl_kernels.integrations.report import FuseReport
from petl_kernels.ops.bottleneck_adapter import OP

__all__ = ["FuseReport", "fuse", "unfuse"]

# Each is a module of this package named after the library, with `survey` and `swap`.
_LIBRARIES = ("adapters", "peft")


def fuse(model: nn.Module, *, impl: str | None = None, strict: bool = False) -> FuseReport:
    """Let the adapters of `model` run fused, in place: same outputs, gradients, parameter names and state_dict.

    Knows the `adapters` library (bottleneck adapters, LoRA and (IA)^3, at every place of a model where they can stand)
    and `peft` (LoRA, (IA)^3 and VeRA on linear layers, LN tuning, SHiRA of whole rows or columns), whose other methods
    are reported with the reason, and hand-written modules whose
    forward, traced, is `[norm,] linear, activation, linear [, scale] [, + residual]` through a bottleneck. Modules are
    swapped by class: isinstance, deepcopy, pickle and torch.save keep working, and adapters may be added, deleted,
    merged, loaded or activated afterwards. Every call checks its own conditions (one active adapter or, in `adapters`,
    a composition that allows it, dropout in training, hooks, dtypes); where they do not hold, the library's own path
    computes it. So it does, with `impl=None`, `peft`'s calls that would not gain. An adapter added later runs
    fused, by the same checks, where another one stood at the time of `fuse`; elsewhere only after another `fuse`.

    Args:
        model: any module that contains the adapters.
        impl: implementation of the ops, as their own `impl=`; None takes the fastest known for each call.
        strict: raise, and change nothing, unless every adapter can be fused.

    Returns:
        The report: what is fused, what is not, and why, by module name.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an unknown `impl`.
        RuntimeError: `strict`, and some adapter cannot be fused or there is none; the message lists the reasons.

    Warns:
        UserWarning: nothing was fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {type(model).__name__}")
    if impl not in (None, "auto", *OP.impls):
        raise ValueError(f"fuse: impl must be one of {('auto', *OP.impls)}, got {impl!r}")
    report, swaps = FuseReport(), []
    for library in _LIBRARIES:
        if library not in sys.modules:
            report.unavailable[library] = "not imported, so no module of this model comes from it"
            continue
        try:
            integration = import_module(f"{__name__}.{library}")
        except Exception as error:  # a broken companion library raises RuntimeError or worse on import
            report.unavailable[library] = f"its integration cannot be imported: {type(error).__name__}: {error}"
            continue
        integration.survey(model, report)
        swaps.append(integration.swap)
    patterns = import_module(f"{__name__}.patterns")  # torch.fx, for which only those pay who fuse
    patterns.survey(model, report)
    swaps.append(patterns.swap)
    if strict and (report.skipped or not report.fused):
        raise RuntimeError(f"fuse: strict, and nothing was changed: {report.summary}\n{report.reasons}")
    before = [(module, module.__class__, _marks(module)) for module in model.modules()]
    try:
        for swap in swaps:
            swap(model, impl)
    except BaseException:
        for module, own, marks in before:
            _restore(module, own, marks)
        raise
    if not report.fused:
        nothing = "" if report.skipped else "  the model contains no bottleneck adapter and no tuner layer of peft"
        found = "\n".join(filter(None, (nothing, report.reasons)))
        warnings.warn(f"petl_kernels.fuse: no module was fused\n{found}", stacklevel=2)
    return report


def unfuse(model: nn.Module) -> int:
    """Give every module that `fuse` swapped its own class back, and return how many there were."""
    restored = 0
    for module in model.modules():
        original = getattr(type(module), "fused_from", None)
        if original is not None:
            _restore(module, original, {})
            restored += 1
    return restored


def _marks(module: nn.Module) -> dict[str, Any]:
    """What `fuse` keeps in a module."""
    return {name: value for name, value in module.__dict__.items() if name.startswith("fused_")}


def _restore(module: nn.Module, own: type, marks: dict[str, Any]) -> None:
    module.__class__ = own  # type: ignore[assignment]
    for name in _marks(module):
        del module.__dict__[name]
    module.__dict__.update(marks)
