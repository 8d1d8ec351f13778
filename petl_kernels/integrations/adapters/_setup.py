"""What the swapped layers of `adapters` share: which adapter acts now, and its gate."""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import Stack
from adapters.context import AdapterSetup, ForwardContext
from torch import Tensor


def lone_name(layer: Any) -> str | None:
    """The adapter that alone is active in this call at this layer, whether it has one of that name or not, or None.

    None also where the gating scores are asked for: the library collects them as it goes.
    """
    config = layer.__dict__.get("adapters_config")
    contexts = AdapterSetup.get_contexts()
    setup: Any = contexts[-1].adapter_setup if contexts else getattr(config, "active_setup", None)
    if type(setup) is not Stack or len(setup.children) != 1 or not isinstance(setup.children[0], str):
        return None
    if config is None or (config.skip_layers is not None and layer.layer_idx in config.skip_layers):
        return None
    forwards = ForwardContext.get_contexts()
    if forwards and forwards[-1].output_adapter_gating_scores:
        return None
    return setup.children[0]


def gate(adapter: Any, x: Tensor) -> Tensor:
    """The factor of each sample by which a gated adapter multiplies, [B, 1, 1]: the mean over x [B, S, d]."""
    return torch.sigmoid(adapter.gate(x)).mean(dim=1).unsqueeze(-1)
