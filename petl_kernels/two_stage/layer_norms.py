"""Stage 1: only the layer norms train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from petl_kernels._names import check_model, freeze_all_but, match


def tune_layer_norms(model: nn.Module, *, also: str | Iterable[str] = ()) -> list[str]:
    """Freeze everything but the scale and shift of every nn.LayerNorm: stage 1 of TTC-Tuning (arXiv:2303.07910).

    Args:
        model: changed in place: `requires_grad`, and `grad` None where frozen.
        also: names or glob patterns of parameters that train as well, such as "classifier.*": a new head has to.

    Returns:
        The names of all parameters that train, in the model's order. 2 d for each layer norm of width d.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no nn.LayerNorm has parameters, or `also` matches nothing; nothing is changed.
    """
    check_model("tune_layer_norms", model)
    named = dict(model.named_parameters())
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    kept = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    if not kept:
        raise ValueError("tune_layer_norms: the model has no nn.LayerNorm with parameters")
    kept |= {id(named[name]) for name in match("tune_layer_norms", "also", also, named)}
    freeze_all_but(model, (p for p in named.values() if id(p) in kept))
    return [name for name, p in named.items() if p.requires_grad]
