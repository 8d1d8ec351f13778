"""The accuracy of kernels beside that of eager PyTorch: `python benchmarks/accuracy.py --op bottleneck_adapter`.

Every call of `petl_kernels.testing.CASES`, with inputs from many seeds, against float64 on the rounded inputs. A row is
a tensor of a call in one dtype; the worst come first. Errors are means over the seeds, in units of the rule's floor
(one unit in the last place of the largest element):

- ours / eager: the mean errors' ratio, half a unit added to both, which rounding the result costs anyone;
- worst / bound: the largest error of a seed over what the tests' rule allows it, which fails above 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from petl_kernels.benchmarking.options import DTYPES, some_of
from petl_kernels.testing import CASES, Case, Error, errors, in_float64, run

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Row:
    """The errors of one tensor of a call, one per seed."""

    call: str
    name: str
    dtype: str
    found: list[Error]

    @property
    def unit(self) -> float:
        return fmean(e.floor for e in self.found)

    @property
    def ours(self) -> float:
        return fmean(e.ours for e in self.found) / self.unit

    @property
    def eager(self) -> float:
        return fmean(e.eager for e in self.found) / self.unit

    @property
    def ratio(self) -> float:
        return (self.ours + 0.5) / (self.eager + 0.5)

    @property
    def failing(self) -> int:
        return sum(not e.ours <= e.bound for e in self.found)

    @property
    def worst(self) -> float:
        return max(e.ours / e.bound for e in self.found)


def measure(case: Case, impl: str, dtype: str, seeds: int, calls: str) -> Iterator[Row]:
    """The rows of one case; `calls` is part of the names of the calls taken."""
    for sample in case.samples:
        if calls not in sample["id"]:
            continue
        found: dict[str, list[Error]] = {}
        for seed in range(seeds):
            inputs = case.inputs(sample, DTYPES[dtype], seed=seed)
            ours, eager = (run(case.fn, inputs, impl=which) for which in (impl, "reference"))
            for error in errors(ours, eager, run(case.fn, in_float64(inputs), impl="reference")):
                if error.largest:  # a tensor of zeros, as dropout makes of one row, has no unit
                    found.setdefault(error.name, []).append(error)
        for name, of_tensor in found.items():
            yield Row(f"{case.name} {sample['id']}", name, dtype, of_tensor)


def main(
    op: Annotated[str | None, typer.Option(help="Ops, comma-separated; all of them otherwise.")] = None,
    impl: Annotated[str, typer.Option(help="The implementation.")] = "cpp",
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(DTYPES)}.")] = "float32,bfloat16,float16",
    calls: Annotated[str, typer.Option(help="Only calls with this in their name.")] = "",
    seeds: Annotated[int, typer.Option(help="Draws of the inputs.")] = 30,
    rows: Annotated[int, typer.Option(help="How many to print.")] = 30,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
) -> None:
    """Measure, then print the worst rows; the exit code is 1 where a mean error is over twice eager's and a unit."""
    torch.set_num_threads(threads or torch.get_num_threads())
    known = [case.name for case in CASES]
    wanted = known if op is None else some_of("--op", op, known)
    found = [
        row
        for case in CASES
        if case.name in wanted and impl in case.op.impls
        for name in some_of("--dtype", dtype, DTYPES)
        for row in measure(case, impl, name, seeds, calls)
    ]
    found.sort(key=lambda row: row.ratio, reverse=True)
    columns = ("call", "tensor", "dtype", "ours", "eager", "ours / eager", "worst / bound", "failing")
    table = Table(*columns, title=f"{impl}, {seeds} seeds: the worst of {len(found)} rows")
    for row in found[:rows]:
        numbers = (f"{value:.2f}" for value in (row.ours, row.eager, row.ratio, row.worst))
        table.add_row(row.call, row.name, row.dtype, *numbers, f"{row.failing}/{len(row.found)}")
    console.print(table)
    draws, failing = sum(len(row.found) for row in found), sum(row.failing for row in found)
    console.print(f"{failing} of {draws} draws fail the rule of the tests", markup=False)
    if any(row.ours > 2 * row.eager + 1 for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
