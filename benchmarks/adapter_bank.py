"""Time `nn.AdapterBank` on mixed batches: `python benchmarks/adapter_bank.py --csv out.csv`.

Beside it one adapter on the same tokens, which is what a batch of one task would cost, and the loop that it replaces:
per task, its samples are selected, adapted and copied back. Forward and backward to x and to the tasks in the batch.
Correctness comes first: where the loop gives another result, nothing is timed and the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from petl_kernels.benchmarking.options import DTYPES, some_of
from petl_kernels.benchmarking.provenance import provenance
from petl_kernels.benchmarking.report import Measurement, print_group, print_origin, save
from petl_kernels.benchmarking.timing import Call, ceilings, interleave
from petl_kernels.nn import AdapterBank

NAMES = ("float32", "bfloat16")  # of the dtypes
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def loop(bank: AdapterBank, x: Tensor, task: Tensor) -> Tensor:
    """The samples of each task through its adapter, one task after the other."""
    y = torch.empty_like(x)
    for t in task.unique().tolist():
        samples = (task == t).nonzero().flatten()
        y = y.index_copy(0, samples, bank.adapters[bank.tasks[t]](x.index_select(0, samples)))
    return y


def providers(bank: AdapterBank, x: Tensor, task: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "one adapter": lambda: bank.adapters[bank.tasks[0]](x),
        "loop": lambda: loop(bank, x, task),
        "petl_kernels": lambda: bank(x, task),
    }


def step(call: Callable[[], Tensor], leaves: list[Tensor], g: Tensor) -> Call:
    """Forward and backward to those of the leaves that take part."""
    return lambda: torch.autograd.grad(call(), leaves, g, allow_unused=True)


def main(
    samples: Annotated[int, typer.Option(help="B.")] = 32,
    tokens: Annotated[int, typer.Option(help="Rows of a sample.")] = 128,
    width: Annotated[int, typer.Option(help="d.")] = 768,
    bottleneck: Annotated[int, typer.Option(help="r.")] = 64,
    tasks: Annotated[int, typer.Option(help="Adapters; samples are dealt to them in turn.")] = 16,
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}.")] = "float32,bfloat16",
    impl: Annotated[str | None, typer.Option(help="Of the bank and of the adapters.")] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per dtype.")] = 4.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
) -> None:
    """Check, then time in interleaved rounds."""
    torch.set_num_threads(threads or torch.get_num_threads())
    names = some_of("--dtype", dtype, NAMES)
    origin = provenance("cpu")
    print_origin(console, origin)
    found: list[Measurement] = []
    for name in names:
        torch.manual_seed(0)
        kind = DTYPES[name]
        bank = AdapterBank(width, bottleneck, [f"task{t}" for t in range(tasks)], init="bert", impl=impl, dtype=kind)
        for adapter in bank.adapters.values():
            adapter.impl = impl  # type: ignore[assignment]
        task = torch.arange(samples) % tasks
        x, g = (torch.randn(samples, tokens, width).to(kind) for _ in range(2))
        leaves = [x.requires_grad_(), *bank.parameters()]
        calls = {who: step(call, leaves, g) for who, call in providers(bank, x, task).items()}
        bound = 1e-4 if name == "float32" else 4e-2
        for ours, theirs in zip(calls["petl_kernels"](), calls["loop"]()):
            if ours is not None and not (ours - theirs).abs().max() <= bound * theirs.abs().max():
                console.print(f"{name}: wrong results, so nothing is timed", markup=False)
                raise typer.Exit(1)
        limits, times = ceilings(kind, "cpu"), interleave(calls, "cpu", seconds, repeats)
        n = samples * tokens
        sample = dict(id=f"{n}x{width}x{bottleneck}, {tasks} tasks", n=n, d=width, r=bottleneck, tasks=tasks)
        work = (12 * n * width * bottleneck, 5 * n * width * kind.itemsize)
        group = [Measurement("adapter_bank", who, "full", sample, name, times[who], *work, limits) for who in calls]
        print_group(console, group, baselines=["one adapter", "loop"])
        found += group
    save(console, csv, found, origin)


if __name__ == "__main__":
    typer.run(main)
