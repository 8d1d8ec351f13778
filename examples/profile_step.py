"""For `petl-kernels profile examples/profile_step.py`: BERT base (random weights) with hand-written Houlsby adapters.

`build` is all that the command needs: it returns a model, a batch and a loss. `batch` may also be a DataLoader.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.testing.models import BERT

SENTENCES = 4


class Adapter(nn.Module):
    """As people write it: down, GELU, up, added to the input."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)
        nn.init.normal_(self.up.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["ids"]), batch["labels"])


def build() -> tuple[nn.Module, dict[str, Tensor], Any]:
    model = BERT()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.after_attention, block.after_ffn = Adapter(768, 64), Adapter(768, 64)
    batch = {"ids": model.batch(SENTENCES, "cpu"), "labels": torch.arange(SENTENCES) % 2}
    return model, batch, loss
