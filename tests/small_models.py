"""Models small enough for tests: a pre-LN transformer of plain modules, and transformers' BERT. Both end in `head`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petl_kernels.two_stage import tune_layer_norms

D, CLASSES, VOCABULARY, TOKENS = 24, 3, 40, 7


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.dropout(self.proj(F.scaled_dot_product_attention(q, k, v)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Plain(nn.Module):
    """`reentrant` None runs the blocks directly, True or False under that kind of activation checkpointing."""

    def __init__(self, blocks: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x).mean(1))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * D
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))


MODELS = {"plain": Plain, "bert": Bert}


def make(kind: str = "plain", seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind](**options)


def batches(count: int = 3, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, size, TOKENS), generator=generator)
    return list(zip(ids, torch.randint(CLASSES, (count, size), generator=generator)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, seed: int = 1) -> None:
    model.train()
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    data = batches(seed=seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, data[step % len(data)]).backward()
        optimizer.step()


def aligned(kind="plain", **options):
    """A model after stage 1: its layer norms and its head have trained, and train."""
    model = make(kind, **options)
    tune_layer_norms(model, also="head.*")
    train(model, 3)
    return model


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    return torch.stack([model(ids) for ids, _ in batches()])


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the model's state."""
    return {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}
