"""The `adapters` library: bottleneck adapters, LoRA and (IA)^3 are swapped, its other methods reported with why not."""

from __future__ import annotations

from adapters.methods.prefix_tuning import PrefixTuningLayer
from adapters.methods.prompt_tuning import PromptTuningLayer
from adapters.methods.reft import ReftLayer
from torch import nn

from petl_kernels.integrations.adapters import bottleneck, lora
from petl_kernels.integrations.report import FuseReport

# The attribute that holds an entry per adapter, and why those stay as they are.
_OTHERS: dict[type, tuple[str, str]] = {
    PrefixTuningLayer: ("prefixes", "keys and values put before the others: the model's own attention computes them"),
    PromptTuningLayer: ("prompt_tunings", "rows put before the embeddings: an index, not projections"),
    ReftLayer: ("refts", "it edits a few positions of the sequence, through a parametrised projection"),
}


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every adapter of the model into the report; nothing is changed."""
    bottleneck.survey(model, report)
    lora.survey(model, report)
    for layer_name, layer in model.named_modules():
        holder, reason = _OTHERS.get(type(layer), ("", ""))
        for name in getattr(layer, holder) if holder else ():
            report.skipped[".".join(filter(None, (layer_name, holder, name)))] = reason


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every site and linear that holds adapters and whose forward is the library's own."""
    bottleneck.swap(model, impl)
    lora.swap(model, impl)
