"""BERT base and ViT-B/16 in plain PyTorch, with places for adapters; at random weights, on which no timing depends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn import BottleneckAdapter, ChannelLinear, ParallelAdapter


@dataclass(frozen=True)
class Size:
    """Of a transformer encoder; `tokens` are what one sample has."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    tokens: int = 128
    pre_norm: bool = False  # ViT normalises before a sub-layer, BERT after it
    vocabulary: int = 30522
    patch: int = 16
    image: int = 224
    classes: int = 10


BERT_BASE = Size()
VIT_B16 = Size(tokens=197, pre_norm=True)


class Block(nn.Module):
    """Attention and feed-forward part, each with its residual connection and layer norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.width
        self.heads, self.pre_norm = size.heads, size.pre_norm
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d), nn.LayerNorm(d)
        self.after_attention: nn.Module = nn.Identity()  # Houlsby's places: what a sub-layer gives, before its residual
        self.after_ffn: nn.Module = nn.Identity()
        self.beside_ffn: nn.Module | None = None  # a parallel adapter's: the feed-forward part's input

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.after_attention(self.output(heads.transpose(1, 2).flatten(2)))

    def ffn(self, x: Tensor) -> Tensor:
        y = self.after_ffn(self.down(F.gelu(self.up(x))))
        return y if self.beside_ffn is None else self.beside_ffn(x, y)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm_attention(x))
            return x + self.ffn(self.norm_ffn(x))
        x = self.norm_attention(x + self.attention(x))
        return self.norm_ffn(x + self.ffn(x))


class Encoder(nn.Module):
    """Embedding (given by a subclass), blocks, and a linear head on the first token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.positions = nn.Parameter(torch.randn(size.tokens, size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.classes)

    def embed(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def batch(self, samples: int, device: str) -> Tensor:
        raise NotImplementedError


class BERT(Encoder):
    """Token ids [samples, tokens] -> logits."""

    def __init__(self, size: Size = BERT_BASE) -> None:
        super().__init__(size)
        self.words = nn.Embedding(size.vocabulary, size.width)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.words(inputs) + self.positions

    def batch(self, samples: int, device: str) -> Tensor:
        return torch.randint(self.size.vocabulary, (samples, self.size.tokens), device=device)


class ViT(Encoder):
    """Images [samples, 3, image, image] -> logits; a class token and a token per patch."""

    def __init__(self, size: Size = VIT_B16) -> None:
        super().__init__(size)
        self.patches = nn.Conv2d(3, size.width, size.patch, stride=size.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, size.width))

    def embed(self, inputs: Tensor) -> Tensor:
        patches = self.patches(inputs).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(inputs), -1, -1), patches], 1) + self.positions

    def batch(self, samples: int, device: str) -> Tensor:
        sides = (self.size.image, self.size.image)
        return torch.randn(samples, 3, *sides, device=device, dtype=self.positions.dtype)


def freeze(model: Encoder) -> None:
    """All but the head."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def houlsby(model: Encoder, r: int = 64) -> None:
    """Adapters after both sub-layers (Houlsby et al. 2019)."""
    freeze(model)
    like = dict(device=model.positions.device, dtype=model.positions.dtype)
    for block in model.blocks:
        block.after_attention, block.after_ffn = (
            BottleneckAdapter(model.size.width, r, init="bert", **like)  # type: ignore[arg-type]
            for _ in range(2)
        )


def parallel(model: Encoder, r: int = 512) -> None:
    """A scaled adapter beside the feed-forward part (He et al. 2021), with their r."""
    freeze(model)
    like = dict(device=model.positions.device, dtype=model.positions.dtype)
    for block in model.blocks:
        block.beside_ffn = ParallelAdapter(model.size.width, r, init="bert", **like)  # type: ignore[arg-type]


def channels(model: Encoder, share: int = 8) -> None:
    """An eighth of the input columns of every linear of the blocks, spread evenly: stage 2 of two-stage tuning."""
    freeze(model)
    for block in model.blocks:
        for name in ("query", "key", "value", "output", "up", "down"):
            linear = getattr(block, name)
            setattr(block, name, ChannelLinear.from_linear(linear, range(0, linear.in_features, share), dim=1))


def nothing(model: Encoder) -> None:
    """Nothing is tuned, yet the gradient goes through every block, as any adapter in the first makes it go."""
    freeze(model)
    model.positions.requires_grad_(True)


METHODS: dict[str, Callable[[Encoder], None]] = {"houlsby": houlsby, "parallel": parallel, "channels": channels}
