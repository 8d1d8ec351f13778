"""What other libraries do for an op, as functions of the op's own arguments; timed where the library is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from petl_kernels.testing import Case, Inputs, run

Baselines = Mapping[str, Callable[..., Tensor]]
_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> peft's layer over it


def _shira(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
) -> Tensor:
    """SHiRA of the `peft` library, its mask the chosen rows or columns: a sparse delta on a copy of the weight."""
    if weight not in _layers:
        _layers[weight] = _shira_layer(weight, bias, channels, dim)
    delta = (channel_weight - weight.index_select(dim, channels)).index_select(dim, channels.argsort())
    changed = {"shira_weight.default": delta.flatten()}
    if bias is not None and channel_bias is not None:
        changed["base_layer.bias"] = bias.index_copy(0, channels, channel_bias)
    return functional_call(_layers[weight], changed, (x,))


def _shira_layer(weight: Tensor, bias: Tensor | None, channels: Tensor, dim: int) -> nn.Module:
    from peft import ShiraConfig
    from peft.tuners.shira.layer import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    mask = torch.zeros_like(weight).index_fill_(dim, channels, 1)
    rank = channels.numel() * weight.shape[1 - dim] // sum(weight.shape)  # only sizes an attribute
    return Linear(base, mask, "default", ShiraConfig(r=rank), r=rank).to(weight.dtype)


LIBRARIES: dict[str, tuple[str, Baselines]] = {"channel_linear": ("peft", {"peft SHiRA": _shira})}


def baselines(case: Case) -> Baselines:
    """The case's own baselines, and those of the libraries that are installed."""
    library, found = LIBRARIES.get(case.name, ("", {}))
    return {**case.baselines, **(found if library and importlib.util.find_spec(library) else {})}


def astray(case: Case, inputs: Inputs, fn: Callable[..., Tensor]) -> list[str]:
    """Where a baseline computes something else; it may be less accurate than we have to be, in its own dtype."""
    pairs = zip(run(fn, inputs).items(), run(case.fn, inputs, impl="reference").items(), strict=True)
    return [
        f"{name} is another one"
        for (name, got), (_, wanted) in pairs
        if not (got.double() - wanted.double()).abs().max() <= 0.1 * wanted.double().abs().max()
    ]
