"""Training and evaluation of a model whose forward gives (loss, logits): what the examples share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]  # the keyword arguments of the model's forward; "labels" among them


def train(
    model: nn.Module, batches: list[Batch], optimizer: Any, seed: int, advance: Callable[[], Any] = lambda: None
) -> list[float]:
    """A step per batch, with linear warm-up over a tenth of the steps, then linear decay; the losses.

    The seed decides the dropout masks.
    """
    torch.manual_seed(seed)
    model.train()
    warmup, steps = max(1, len(batches) // 10), len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses = []
    for batch in batches:
        loss, _ = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        advance()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """The part of the examples that the model gets right, in evaluation mode."""
    model.eval()
    right = sum(int((model(**batch)[1].argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)
