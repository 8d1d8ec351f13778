"""Every layer of `petl_kernels.nn` in a model of its own, small enough to be trained in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels import nn as layers

D, R, HEADS, TOKENS, SAMPLES, CHANNELS = 16, 4, 2, 5, 8, (11, 2, 7)
Forward = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A linear that trains, so that the layer's dx matters, then the layer beside a frozen linear and a norm."""

    def __init__(self, layer: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.block = Block(layer, forward)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.block(F.gelu(self.first(x)), task)


class Block(nn.Module):
    """What is sharded as a whole, as transformer blocks are: `nn.MAM` and others are called by their block."""

    def __init__(self, layer: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.layer, self.call = layer, forward
        self.linear, self.norm = nn.Linear(D, D).requires_grad_(False), nn.LayerNorm(D).requires_grad_(False)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.call(self, x, task)


def alone(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(x)


def by_task(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(x, task)


def beside(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(x, F.relu(block.linear(x)))


def around_norm(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(block.linear(x), x, block.norm)


def attention(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(x, x, x, need_weights=False)[0]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def prefix(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return block.layer(heads(block.linear(x)), heads(x), heads(x)).transpose(1, 2).flatten(-2)


def mam(block: Block, x: Tensor, task: Tensor) -> Tensor:
    y = block.layer.prefix(heads(block.linear(x)), heads(x), heads(x)).transpose(1, 2).flatten(-2)
    return block.layer.parallel(y, F.relu(block.linear(y)))


def on_heads(block: Block, x: Tensor, task: Tensor) -> Tensor:
    return x + block.layer(x, block.linear)


@dataclass(frozen=True)
class Case:
    """A layer, and how its block calls it."""

    make: Callable[[], nn.Module]
    forward: Forward = alone
    gradient: int | None = None  # how many numbers of this layer travel per step, of methods that promise few
    tasks: tuple[int, ...] = (0, 1, 1, 0, 1, 0, 1, 1)  # of the samples: both halves have these, and none has 2


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def self_attention() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
    attention.out_proj.requires_grad_(False)
    return attention


K = len(CHANNELS)
CASES = {
    "BottleneckAdapter": Case(lambda: layers.BottleneckAdapter(D, R, scale="learned", impl="cpp")),
    "AdapterNorm": Case(lambda: layers.AdapterNorm(D, R, impl="cpp"), beside),
    "AdapterPlus": Case(lambda: layers.AdapterPlus(D, R, drop_path=0.0, impl="cpp")),
    "ParallelAdapter": Case(lambda: layers.ParallelAdapter(D, R, impl="cpp"), beside),
    "AdaptFormer": Case(lambda: layers.AdaptFormer(D, R, dropout=0.0, impl="cpp"), beside),
    "LowRankPAL": Case(lambda: layers.LowRankPAL(D, R, impl="cpp"), beside),
    "PfeifferAdapter": Case(lambda: layers.PfeifferAdapter(D, R, impl="cpp"), around_norm),
    "AdapterBank": Case(lambda: layers.AdapterBank(D, R, ["a", "b", "c"], impl="cpp"), by_task),
    "AdapterBank, every task": Case(
        lambda: layers.AdapterBank(D, R, ["a", "b", "c"], every_task=True, impl="cpp"),
        by_task,
        tasks=(0, 1, 1, 0, 1, 2, 2, 1),
    ),
    "ChannelAdapter": Case(
        lambda: layers.ChannelAdapter(D, CHANNELS, scale="learned", impl="cpp"), gradient=K * K + K + 1
    ),
    "ChannelLinear": Case(lambda: layers.ChannelLinear.from_linear(linear(), CHANNELS, impl="cpp"), gradient=K * D + K),
    "ChannelLinear, columns": Case(
        lambda: layers.ChannelLinear.from_linear(linear(), CHANNELS, dim=1, impl="cpp"), gradient=K * D
    ),
    "DiffPruningLinear": Case(lambda: layers.DiffPruningLinear.from_linear(linear(), groups="columns", alpha=0.3)),
    "IA3Linear": Case(lambda: layers.IA3Linear.from_linear(linear(), impl="cpp"), gradient=D),
    "IA3Linear, slices": Case(lambda: layers.IA3Linear.from_linear(linear(), slices=[(3, 9)], impl="cpp"), gradient=6),
    "IA3MultiheadAttention": Case(
        lambda: layers.IA3MultiheadAttention.from_attention(self_attention(), impl="cpp"), attention, gradient=2 * D
    ),
    "LayerNorm": Case(lambda: layers.LayerNorm(D)),
    "LoRALinear": Case(lambda: layers.LoRALinear.from_linear(linear(), R, impl="cpp"), gradient=2 * D * R),
    "LoRAMergedLinear": Case(lambda: layers.LoRAMergedLinear.from_linear(linear(), R, [(0, 5), (9, 16)])),
    "LoRAMultiheadAttention": Case(
        lambda: layers.LoRAMultiheadAttention.from_attention(self_attention(), R), attention
    ),
    "MAM": Case(lambda: layers.MAM(D, HEADS, prefix_length=3, bottleneck=R, reparametrization=6, impl="cpp"), mam),
    "MultiHeadParallelAdapter": Case(lambda: layers.MultiHeadParallelAdapter(D, HEADS, R), on_heads),
    "NormAdapter": Case(lambda: layers.NormAdapter(D, R, norm="rms", impl="cpp")),
    "PrefixAdapter": Case(lambda: layers.PrefixAdapter(D, HEADS, 3, reparametrization=None), prefix),
}


def make(name: str) -> Model:
    """The model of a layer, in float64; what trains has moved away from where it starts."""
    torch.manual_seed(0)
    case = CASES[name]
    model = Model(case.make(), case.forward).double().eval()  # of what is random, only the draws are left out
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    """x [SAMPLES, TOKENS, D], and the task of each sample."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, TOKENS, D, generator=generator, dtype=torch.float64)
    return x, torch.tensor(CASES[name].tasks)


def loss(model: nn.Module, x: Tensor, task: Tensor) -> Tensor:
    return model(x, task).square().mean()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One with state, in which rounding errors do not grow as in Adam's quotients."""
    return torch.optim.SGD(trained(model), lr=0.3, momentum=0.9)
