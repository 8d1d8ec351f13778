"""Make the table that "auto" reads on a GPU: `python benchmarks/crossover.py benchmarks/results/*.csv`.

Of every call that `--suite gpu` timed it says which kernels beat eager by the wall time, and which beat `torch.compile`
by the time on the GPU with a cold L2 cache; forward and backward together where an op has both. Files of other
benchmarks have no such rows and add nothing. The table is written anew each time, from the files that are given.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated

import typer

from petl_kernels.ops import _measured
from petl_kernels.ops._measured import COLUMNS, UNKNOWN
from petl_kernels.testing import CASES

WORTH = 1.03  # times faster than the reference: less is in the noise of a run
Key = tuple[str, str, str, str, str]  # device, capability, op, dtype, sizes
Times = dict[str, dict[str, dict[str, float]]]  # metric -> provider -> sample -> milliseconds


def read(paths: Iterable[Path]) -> dict[Key, Times]:
    """The times that decide, of every call in the files."""
    decides = {case.name: "full" if case.differentiable else "forward" for case in CASES}
    found: dict[Key, Times] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["metric_name"] not in ("wall", "gpu_cold"):
                    continue
                config = json.loads(row["extra_benchmark_config_str"])
                kernel = row["kernel_name"]
                if "sizes" not in config or decides.get(kernel) != row["kernel_operation_mode"]:
                    continue
                key = (row["gpu_name"], config["capability"], kernel, config["dtype"], config["sizes"])
                times = found[key][row["metric_name"]][row["kernel_provider"]]
                times[row["x_value"]] = float(row["y_value_50"])
    return found


def faster(times: dict[str, dict[str, float]], baseline: str, kernels: Iterable[str]) -> str:
    """The kernels that beat the baseline on the calls of these sizes taken together, best first."""
    if baseline not in times:
        return UNKNOWN
    gains = {}
    for name in kernels:
        both = [sample for sample in times[baseline] if sample in times.get(name, {})]
        if both:
            gains[name] = geometric_mean(times[baseline][s] / times[name][s] for s in both)
    return " ".join(sorted((n for n, gain in gains.items() if gain >= WORTH), key=lambda n: -gains[n]))


def main(
    results: Annotated[list[Path], typer.Argument(help="Files that --suite gpu wrote.")],
    table: Annotated[Path, typer.Option(help="Where the table goes.")] = _measured.PATH,
) -> None:
    """Write the crossover table."""
    impls = {case.name: [n for n in case.op.impls if n not in ("reference", "cpp")] for case in CASES}
    rows = []
    for key, times in sorted(
        read(results).items(), key=lambda item: (*item[0][:4], list(map(int, item[0][4].split("x"))))
    ):
        kernels = impls[key[2]]
        rows.append((*key, faster(times["wall"], "eager", kernels), faster(times["gpu_cold"], "compile", kernels)))
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(rows)} calls on {len({row[0] for row in rows})} GPUs written to {table}")


if __name__ == "__main__":
    typer.run(main)
