"""Time an optimizer's step over the matrices of BERT base: `python benchmarks/optimizer.py --csv out.csv`.

An eighth of the rows (or columns) of 72 matrices is tuned. Providers: torch.optim.AdamW on the full matrices with
masked gradients, foreach and fused; on compact parameters of the chosen rows alone, foreach and fused; ChannelAdamW on
rows and on columns of the full matrices and on the compact parameters. Correctness comes first: where an update fails
the rule of the tests, nothing is timed and the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from petl_kernels.benchmarking.options import DTYPES, some_of
from petl_kernels.benchmarking.provenance import provenance
from petl_kernels.benchmarking.report import Measurement, print_origin, save
from petl_kernels.benchmarking.timing import ceilings, interleave
from petl_kernels.optim import ChannelAdamW, Channels
from petl_kernels.testing import Outcome, judge

NAMES = ("float32", "bfloat16", "float16")  # of the dtypes
SHARE = 8  # one of so many rows or columns is tuned
FLOPS = 13  # of an element's update
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main(
    layers: Annotated[int, typer.Option(help="Encoder layers, of six matrices each.")] = 12,
    width: Annotated[int, typer.Option(help="Width d; the matrices are 4 of d x d, 4d x d and d x 4d.")] = 768,
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}.")] = "float32,bfloat16",
    impl: Annotated[
        str | None, typer.Option(help="ChannelAdamW's implementation; the fastest known otherwise.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per dtype.")] = 20.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
) -> None:
    """Check, then time torch's optimizers and ours in interleaved rounds."""
    torch.set_num_threads(threads or torch.get_num_threads())
    dtypes = some_of("--dtype", dtype, NAMES)
    origin = provenance(device)
    print_origin(console, origin)
    wrong = [f"{name}: {f}" for name in dtypes for f in failures(width, DTYPES[name], device, impl)]
    if wrong:
        console.print("Wrong updates, so nothing is timed:", *wrong, sep="\n  ", markup=False)
        raise typer.Exit(1)
    found: list[Measurement] = []
    for name in dtypes:
        found += measure(layers, width, name, device, impl, seconds, repeats)
        print_table([m for m in found if m.dtype == name])
    save(console, csv, found, origin)


def shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """The matrices of an encoder: four of the attention and two of the feed-forward part, per layer."""
    return [(width, width)] * 4 * layers + [(4 * width, width)] * layers + [(width, 4 * width)] * layers


def leaves(of: Iterable[tuple[int, int]], dtype: torch.dtype, device: str) -> list[Parameter]:
    return [Parameter(torch.randn(shape, device=device).to(dtype)) for shape in of]


def chosen(params: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Every channel of a random eighth, in ascending order, as a selection has them."""
    return [torch.randperm(p.shape[dim], device=p.device)[: p.shape[dim] // SHARE].sort().values for p in params]


def set_masked_gradients(params: Sequence[Parameter], channels: Sequence[Tensor], dim: int) -> None:
    """Dense gradients, zero outside the channels."""
    for p, c in zip(params, channels):
        own = torch.randn_like(p).index_select(dim, c)
        p.grad = torch.zeros_like(p).index_copy_(dim, c, own)


def failures(width: int, dtype: torch.dtype, device: str, impl: str | None) -> list[str]:
    """What is wrong with three steps on rows, on columns and on whole tensors of each shape that is timed."""
    found = []
    for dim in (0, 1, None):
        params = leaves(dict.fromkeys(shapes(1, width)), dtype, device)
        channels = chosen(params, dim or 0)
        before = [p.detach().clone() for p in params]
        pick = [(lambda t, c=c: t if dim is None else t.index_select(dim, c)) for c in channels]  # noqa: B023
        eager = [Parameter(own(p.detach()).clone()) for own, p in zip(pick, params)]
        exact = [Parameter(p.detach().to(torch.float64, copy=True)) for p in eager]
        options: dict[str, Any] = dict(lr=0.3, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1)
        items = params if dim is None else [Channels(p, c, dim) for p, c in zip(params, channels)]
        optimizers = (ChannelAdamW(items, impl=impl, **options), AdamW(eager, **options), AdamW(exact, **options))
        for _ in range(3):
            for p, e, x, own in zip(params, eager, exact, pick):
                p.grad = torch.randn_like(p)
                e.grad, x.grad = own(p.grad).clone(), own(p.grad).double()
            for optimizer in optimizers:
                optimizer.step()
        for p, b, c, e, x, own in zip(params, before, channels, eager, exact, pick):
            where = f"{'whole' if dim is None else ('rows', 'columns')[dim]} of {list(p.shape)}"
            outcomes = [Outcome(t.detach()) for t in (own(p.detach()), e, x)]
            found += [f"{where}: {f}" for f in judge(outcomes[0], outcomes[1], outcomes[2])]
            if dim is not None and not torch.equal(p.detach().index_fill(dim, c, 0), b.index_fill(dim, c, 0)):
                found.append(f"{where}: an element outside the selection has changed")
    return found


def providers(layers: int, width: int, dtype: torch.dtype, device: str, impl: str | None) -> dict[str, Optimizer]:
    """Every optimizer, with gradients in place. The dense ones and ours on rows share parameters and gradients."""
    full, wide = (leaves(shapes(layers, width), dtype, device) for _ in range(2))
    rows, columns = chosen(full, 0), chosen(wide, 1)
    set_masked_gradients(full, rows, 0)
    set_masked_gradients(wide, columns, 1)
    compact = [[Parameter(p.detach()[c].clone()) for p, c in zip(full, rows)] for _ in range(3)]
    for params in compact:
        for p in params:
            p.grad = torch.randn_like(p)
    return {
        "AdamW foreach, dense": AdamW(full, foreach=True),
        "AdamW fused, dense": AdamW(full, fused=True),
        "AdamW foreach, compact": AdamW(compact[0], foreach=True),
        "AdamW fused, compact": AdamW(compact[1], fused=True),
        "ChannelAdamW, rows": ChannelAdamW([Channels(p, c) for p, c in zip(full, rows)], impl=impl),
        "ChannelAdamW, columns": ChannelAdamW([Channels(p, c, 1) for p, c in zip(wide, columns)], impl=impl),
        "ChannelAdamW, compact": ChannelAdamW(compact[2], impl=impl),
    }


def measure(
    layers: int, width: int, dtype: str, device: str, impl: str | None, seconds: float, repeats: int | None
) -> list[Measurement]:
    """Time a step of every provider in one dtype."""
    limits = ceilings(DTYPES[dtype], device)
    optimizers = providers(layers, width, DTYPES[dtype], device, impl)
    calls: dict[str, Callable[[], Any]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    times = interleave(calls, device, seconds, repeats)
    elements = sum(a * b for a, b in shapes(layers, width))
    sample = {"id": f"{layers}x{width}/{SHARE}", "layers": layers, "width": width, "share": SHARE}
    found = []
    for name, optimizer in optimizers.items():
        updated = elements if "dense" in name else elements // SHARE
        held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        # p, g, m, v are read and p, m, v written.
        work = (FLOPS * updated, 7 * updated * DTYPES[dtype].itemsize)
        found.append(Measurement("adamw_step", name, "step", sample, dtype, times[name], *work, limits, held))
    return found


def print_table(group: Sequence[Measurement]) -> None:
    """One dtype: times, the bandwidth of what has to be moved, the state, and how often faster than each baseline."""
    assert group[0].ceilings is not None
    title = f"step, {group[0].sample['id']}, {group[0].dtype}, copy {group[0].ceilings.bytes / 1e9:.0f} GB/s"
    table = Table(title=title, title_justify="left")
    baselines = [m.provider for m in group if m.provider.startswith("AdamW ")]
    table.add_column("provider", no_wrap=True)
    for heading in ("ms", "20%", "80%", "GB/s", "state MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for baseline in baselines:
        table.add_column("x " + baseline.removeprefix("AdamW "), justify="right")
    medians = {m.provider: m.seconds.median for m in group}
    for m in group:
        figures = [f"{1e3 * s:.2f}" for s in (m.seconds.median, m.seconds.low, m.seconds.high)]
        figures += [f"{m.bytes / m.seconds.median / 1e9:.1f}", f"{(m.saved_bytes or 0) / 2**20:.1f}"]
        table.add_row(m.provider, *figures, *(f"{medians[b] / m.seconds.median:.2f}" for b in baselines))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
