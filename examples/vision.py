"""A small vision transformer and real scanned digits: the backbone of `two_stage.py --vision`.

The images are the 1797 digits of 8 x 8 pixels that scikit-learn holds: the test set of the UCI optical recognition of
handwritten digits (Alpaydin and Kaynak 1998), by 13 writers. A digit is cut into patches of 2 x 2 pixels: 16 tokens, 17
with the class token.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import Batch, train

WIDTH, DEPTH, HEADS = 96, 4, 4
PATCH = 2
TOKENS = (8 // PATCH) ** 2 + 1
CLASSES = 5  # of the pretraining, and of the transfer

Digits = tuple[Tensor, Tensor]  # patches [n, 16, 4] from 0 to 1, labels [n] from 0


class Block(nn.Module):
    """A pre-LN transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # Places where a method can put a module: the two branches before they are added, the stream after attention.
        self.branch1, self.branch2, self.stream = nn.Identity(), nn.Identity(), nn.Identity()

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention of x [batch, tokens, width]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(x + self.branch1(self.attention(self.norm1(x))))
        return x + self.branch2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-LN blocks, a linear head on the class token."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the logits [batch, 5]."""
        x = torch.cat([self.cls.expand(len(patches), -1, -1), self.patch(patches)], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)[:, 0])
        return F.cross_entropy(logits, labels), logits


def digits(first: int, seed: int) -> Digits:
    """The digits first .. first + 4 in an order drawn by the seed, as patches, labelled from 0."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target) - first
    rows = ((labels >= 0) & (labels < CLASSES)).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    side = 8 // PATCH
    patches = images[rows].view(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, side * side, PATCH * PATCH)
    return patches, labels[rows]


def batches(data: Digits, size: int, steps: int, seed: int) -> list[Batch]:
    """`steps` random batches, epoch by epoch."""
    rng = random.Random(seed)
    patches, labels = data
    order: list[int] = []
    result = []
    for _ in range(steps):
        while len(order) < size:
            order += rng.sample(range(len(labels)), len(labels))
        rows, order = torch.tensor(order[:size]), order[size:]
        result.append({"patches": patches[rows], "labels": labels[rows]})
    return result


def pretrained(steps: int, seed: int) -> ViT:
    """A ViT trained on the digits 0 to 4, all of them: the transfer is to other digits."""
    torch.manual_seed(seed)
    model = ViT(WIDTH, DEPTH, HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    train(model, batches(digits(0, seed), 32, steps, seed), optimizer, seed)
    return model


def whole(data: Digits) -> Batch:
    """All of the images as one batch."""
    return {"patches": data[0], "labels": data[1]}
