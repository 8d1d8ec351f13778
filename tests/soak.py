"""`make soak`: thousands of training steps through every layer and both optimizers, in flat memory.

    python tests/soak.py --steps 10000

Batches have another size, other tasks and other tensors at every step; now and then a method is attached and detached,
a model fused, a state saved and loaded. Between the end of the warm-up and the end of the run Python's objects and
blocks, the bytes in use of malloc's heap, the process's resident memory and the package's tables must not grow.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from petl_kernels import attach, detach, fuse, unfuse
from petl_kernels import nn as layers
from petl_kernels.ops.channel_importance import channel_importance
from petl_kernels.optim import ChannelAdamW, Channels, ChannelSGD

D, R, TASKS = 24, 6, ("a", "b", "c")
# What may be more at the end than after the warm-up: a leak of one small object per step is more than all of these.
ALLOWED = {"objects": 40, "blocks": 400, "heap": 40 << 10, "resident": 4 << 20, "tables": 0}


TABLES = (
    ("ops._validate", "_passed"),
    ("ops.channel_linear", "_written"),
    ("nn.adapter_bank", "_routes"),
    ("methods.attach", "_attached"),
)


class Net(nn.Module):
    """Every layer that calls an op, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        channels = torch.randperm(D)[: D // 3]
        self.adapter = layers.BottleneckAdapter(D, R, dropout=0.1)
        self.post, self.pre = layers.AdapterNorm(D, R), layers.NormAdapter(D, R)
        self.rows = layers.ChannelLinear.from_linear(nn.Linear(D, D), channels)
        self.columns = layers.ChannelLinear.from_linear(nn.Linear(D, D), channels, dim=1)
        self.salient = layers.ChannelAdapter(D, channels, scale="learned")
        self.lora = layers.LoRALinear.from_linear(nn.Linear(D, D), R)
        self.ia3 = layers.IA3Linear.from_linear(nn.Linear(D, D))
        self.bank = layers.AdapterBank(D, R, TASKS)
        self.norm, self.dense = layers.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor, tasks: list[str]) -> Tensor:
        x = self.pre(self.post(self.adapter(x), x))
        x = self.salient(self.columns(self.rows(x)))
        return self.dense(self.norm(self.bank(self.ia3(self.lora(x)), tasks)))


class HandWritten(nn.Module):
    """An adapter that `fuse` recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, R), nn.Linear(R, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


class Training:
    """The net with its optimizers, and a small encoder for what changes a model's structure."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # these shapes have no work for two
        self.net, self.random = Net(), torch.Generator().manual_seed(1)
        dense = [self.net.dense.weight]
        others = [p for p in self.net.parameters() if p.requires_grad and p is not dense[0]]
        some = torch.arange(0, D, 3)
        self.optimizers = [
            ChannelAdamW([*others[::2], Channels(dense[0], some)], lr=1e-3),
            ChannelSGD(others[1::2], lr=1e-3, momentum=0.9),
        ]
        layer = nn.TransformerEncoderLayer(D, 2, D, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def step(self, number: int, rebuild: bool) -> None:
        samples, tokens = (int(torch.randint(1, 7, (), generator=self.random)) for _ in range(2))
        x = torch.randn(samples, tokens, D, generator=self.random)
        names = [TASKS[int(i)] for i in torch.randint(len(TASKS), (samples,), generator=self.random)]
        tasks = names if number % 2 else torch.tensor([TASKS.index(name) for name in names])
        y = self.net(x, tasks)
        y.square().mean().backward()
        channel_importance(x, y.detach())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 3 > 0)
        if number % 10 == 0:
            with torch.no_grad():
                self.net.eval()(x, tasks)
            self.net.train()
        if rebuild:
            self.rebuild(x)

    def settle(self) -> None:
        """To what is there between any two steps: which tasks the last one had makes no difference."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def rebuild(self, x: Tensor) -> None:
        """What happens between trainings rather than in one."""
        for method in ("lora", "parallel", "prefix"):
            attach(self.encoder, method)
            self.encoder(x).sum().backward()
            self.encoder.zero_grad()
            detach(self.encoder)
        model = nn.Sequential(HandWritten(), nn.LayerNorm(D), HandWritten())
        fuse(model)
        copy.deepcopy(model)(x).sum().backward()
        unfuse(model)
        self.net.load_state_dict(copy.deepcopy(self.net.state_dict()))
        for optimizer in self.optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


class _MallInfo(ctypes.Structure):  # glibc's mallinfo2
    _fields_: ClassVar = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]
    MAPPED, IN_USE = "field_4", "field_7"


def measure() -> dict[str, int]:
    """What must not grow, after everything that can be freed is."""
    gc.collect()
    kept = (getattr(sys.modules[f"petl_kernels.{module}"], name) for module, name in TABLES)
    found = {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks(), "tables": sum(map(len, kept))}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):  # glibc's own count, to the byte
        libc.mallinfo2.restype = _MallInfo
        libc.malloc_trim(0)
        info = libc.mallinfo2()
        found["heap"] = getattr(info, info.MAPPED) + getattr(info, info.IN_USE)
    if (statm := Path("/proc/self/statm")).exists():
        found["resident"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return found


def soak(steps: int, leak: Callable[[], Any] | None = None) -> Iterator[tuple[int, dict[str, int]]]:
    """(step, measures) after the warm-up, a fifth of the steps, and every tenth of them; each step calls `leak`."""
    training, tenth = Training(), steps // 10
    for number in range(1, 10 * tenth + 1):
        training.step(number, rebuild=number % min(tenth, 50) == 0)
        if leak is not None:
            leak()
        if number % tenth == 0 and number > tenth:
            training.settle()
            yield number, measure()


def grown(samples: list[tuple[int, dict[str, int]]]) -> dict[str, int]:
    """What grew by more than is allowed, and by how much, the largest of its steps left out: a table doubles once."""
    growth = {}
    for name in samples[0][1]:
        values = [measures[name] for _, measures in samples]
        growth[name] = values[-1] - values[0] - max(b - a for a, b in pairwise(values))
    return {name: more for name, more in growth.items() if more > ALLOWED[name]}


app = typer.Typer(add_completion=False)


@app.command()
def main(steps: Annotated[int, typer.Option(min=100, help="Training steps.")] = 10_000) -> None:
    """Train, and fail where memory grows."""
    console, samples, begin = Console(), [], time.perf_counter()
    table = Table("step", *ALLOWED, "seconds")
    for number, measures in soak(steps):
        samples.append((number, measures))
        table.add_row(
            f"{number:,}", *(f"{measures.get(n, 0):,}" for n in ALLOWED), f"{time.perf_counter() - begin:.0f}"
        )
    console.print(table)
    if more := grown(samples):
        console.print(f"grown: {more}; allowed: {ALLOWED}", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
