"""Six ways to fit a pretrained model to a task, each over any backbone that says where its parts are.

The model has a `head`, which every method trains; its forward gives (loss, logits). What TTC-Tuning (arXiv:2303.07910)
used for score, number and placement of its channels is not public, and SCT (arXiv:2309.08513) is defined for pre-LN
vision transformers: `CHOICES` says what was chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from petl_kernels import two_stage
from petl_kernels.nn import BottleneckAdapter, ChannelAdapter
from petl_kernels.optim import ChannelAdamW
from training import Batch, train

FRACTION = 1 / 8  # of the channels of a layer: SCT's K of 96 for d = 768, and our k
REDUCTION = 8  # d / r of the Houlsby adapters
STAGE_1 = 0.3  # of the steps
WEIGHT_DECAY = 0.01
HEAD = "head.*"

CHOICES = """Ours, because the TTC paper's are not public: the Taylor score (gate form g * a on inputs of the linears,
summed over the tokens of a batch, squared, summed over batches), k = 1/8 of the input channels of each linear, their
columns of the weight as what is tuned (of the input only these channels are saved for the backward pass), layer norms
tuned in both stages, 3 of 10 steps for the first. SCT is as in its code: K = d/8, L2 score, after the attention's
residual, s = 1; ours is where that is in a post-LN BERT: behind the attention's layer norm, all tokens scored."""


@dataclass(frozen=True)
class Backbone:
    """Names, as glob patterns, of the modules at which the methods act.

    Attributes:
        linears: the linears that two-stage tuning may choose channels of.
        branches: modules whose output is a sub-layer's, before it is added to the residual: Houlsby's place.
        stream: modules whose output is the residual stream after attention: SCT's place.
        skip_tokens: leading tokens that SCT's score leaves out, the class token of a ViT.
        mask: batch -> bool [batch, tokens], the tokens that are not padding.
    """

    linears: tuple[str, ...]
    branches: tuple[str, ...]
    stream: str
    skip_tokens: int = 0
    mask: Callable[[Batch], Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """A pretrained model with a fresh head, and the data of one task."""

    name: str
    model: nn.Module
    backbone: Backbone
    batches: list[Batch]
    scoring: list[Batch]
    held_out: list[Batch]


Stage = Callable[[nn.Module, Problem], None]  # changes the model so that what it names, and nothing else, trains


def head_only(model: nn.Module, problem: Problem) -> None:
    """Linear probing."""
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)


def layer_norms(model: nn.Module, problem: Problem) -> None:
    """Scale and shift of every layer norm: also stage 1 of the two-stage paradigm."""
    two_stage.tune_layer_norms(model, also=HEAD)


def sct(model: nn.Module, problem: Problem) -> None:
    """A K x K linear per block on the channels with the largest L2 norms."""
    at = problem.backbone
    scores = two_stage.score_channels_l2(
        model,
        problem.scoring,
        lambda model, batch: model(**batch),
        lambda batch: batch["labels"],
        where=at.stream,
        skip_tokens=at.skip_tokens,
        mask_fn=at.mask,
    )
    head_only(model, problem)
    selection = two_stage.select(scores, FRACTION)
    for name, chosen in selection.items():
        _append(model, name, ChannelAdapter(selection.widths[name], chosen))


def channels(model: nn.Module, problem: Problem) -> None:
    """Stage 2: the columns with the largest Taylor scores in every linear, beside what stage 1 trains."""
    scores = two_stage.score_channels(
        model,
        problem.scoring,
        lambda model, batch: model(**batch)[0],
        where=problem.backbone.linears,
        side="input",
    )
    two_stage.tune_channels(model, two_stage.select(scores, FRACTION), dim=1, keep_trainable=True)


def houlsby(model: nn.Module, problem: Problem) -> None:
    """An adapter after each attention and each feed-forward block, and the layer norms (arXiv:1902.00751)."""
    layer_norms(model, problem)
    norm = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    width = norm.normalized_shape[0]
    for name in _names(model, problem.backbone.branches):
        _append(model, name, BottleneckAdapter(width, width // REDUCTION, activation="gelu_tanh"))


def full(model: nn.Module, problem: Problem) -> None:
    """Every weight that the forward uses."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)  # BERT's, of which no classifier here makes use


# Where there are two stages, each has a part of the steps.
METHODS: dict[str, tuple[Stage, ...]] = {
    "head only": (head_only,),
    "LayerNorm": (layer_norms,),
    "SCT": (sct,),
    "two-stage": (layer_norms, channels),
    "Houlsby": (houlsby,),
    "full": (full,),
}


@dataclass
class Fitted:
    """A model that a method has fitted to a task.

    Attributes:
        model, optimizer: as the last stage left them.
        losses: of every step.
        trained: name -> number of elements of what any stage trained.
        optimizer_bytes: of the largest optimizer state of a stage.
    """

    model: Any
    optimizer: Any = None
    losses: list[float] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)
    optimizer_bytes: int = 0

    def parameters(self, head: bool) -> int:
        """How many trained, with or without the head's."""
        return sum(count for name, count in self.trained.items() if head or not fnmatchcase(name, HEAD))


def fit(
    fitted: Fitted,
    stages: tuple[Stage, ...],
    problem: Problem,
    rates: tuple[float, ...],
    head_rate: float,
    seed: int,
    advance: Any,
) -> None:
    """Run the stages of a method, each with an optimizer and a schedule of its own."""
    first = round(STAGE_1 * len(problem.batches)) if len(stages) == 2 else len(problem.batches)
    for stage, rate, batches in zip(stages, rates, (problem.batches[:first], problem.batches[first:])):
        torch.manual_seed(seed)  # of new modules
        stage(fitted.model, problem)
        trained = {name: p for name, p in fitted.model.named_parameters() if p.requires_grad}
        fitted.trained |= {name: p.numel() for name, p in trained.items()}
        fitted.optimizer = _optimizer(stage, trained, rate, head_rate)
        fitted.losses += train(fitted.model, batches, fitted.optimizer, seed, advance)
        state = (t for values in fitted.optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
        fitted.optimizer_bytes = max(fitted.optimizer_bytes, sum(t.nbytes for t in state))


def save(path: Path, fitted: Fitted, problem: Problem) -> int:
    """Write what the task needs beside the backbone into a file; its size in bytes."""
    if any("channel_weight" in name for name in fitted.trained):
        # It also refuses a model whose linears changed outside of the chosen channels.
        two_stage.save_task(path, fitted.model, backbone=problem.model)
    else:
        state = fitted.model.state_dict()
        kept = (name for name in state if name in fitted.trained or name.endswith(".channels"))
        save_file({name: state[name].contiguous() for name in kept}, path)
    return path.stat().st_size


def _optimizer(stage: Stage, trained: dict[str, nn.Parameter], rate: float, head_rate: float) -> torch.optim.Optimizer:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(head_rate if fnmatchcase(name, HEAD) else rate, []).append(parameter)
    # The same arithmetic; ChannelAdamW takes many small tensors in one call.
    kind = ChannelAdamW if stage in (sct, channels) else torch.optim.AdamW
    return kind([{"params": parameters, "lr": lr} for lr, parameters in groups.items()], weight_decay=WEIGHT_DECAY)


def _names(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_modules() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _append(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` take the output of the module with this name."""
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), module))
