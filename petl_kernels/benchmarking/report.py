"""Measurements as tables for people and as CSV in the column order of Liger-Kernel's benchmark data."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from petl_kernels.benchmarking.timing import Ceilings, Quantiles

COLUMNS = [
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "petl_kernels_version",
]


Metric = tuple[str, str, float, float, float]  # name, unit, median, 20 % and 80 % quantile


class Reported(Protocol):
    """What a CSV holds of a measurement."""

    @property
    def kernel(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def sample(self) -> Mapping[str, Any]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...
    def metrics(self) -> Iterator[Metric]: ...


@dataclass(frozen=True)
class Measurement:
    """One provider on one call: its time, and what that means for the work the call has to do."""

    kernel: str
    provider: str
    mode: str
    sample: Mapping[str, Any]
    dtype: str
    seconds: Quantiles
    flops: int
    bytes: int
    ceilings: Ceilings | None = None
    saved_bytes: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in self.sample.items() if type(value) is int}

    @property
    def ceiling(self) -> float:
        """Percent of the machine's own ceiling: the time that its matmul or its copy would need, over ours."""
        assert self.ceilings is not None
        ideal = max(self.flops / self.ceilings.flops, self.bytes / self.ceilings.bytes)
        return 100 * ideal / self.seconds.median

    @property
    def figures(self) -> dict[str, Any]:
        """What a row says of the run beside its machine and versions."""
        if self.ceilings is None:
            return {}
        return {"ceiling_gflops": self.ceilings.flops / 1e9, "ceiling_gbs": self.ceilings.bytes / 1e9}

    def metrics(self) -> Iterator[Metric]:
        """A rate's 20% quantile comes from the 80% of the time."""
        t = self.seconds
        factor, unit = (1e6, "us") if self.mode == "host" else (1e3, "ms")
        yield "speed", unit, t.median * factor, t.low * factor, t.high * factor
        if self.mode == "host":
            return
        for name, unit, work in (("throughput", "GFLOP/s", self.flops), ("bandwidth", "GB/s", self.bytes)):
            yield name, unit, work / t.median / 1e9, work / t.high / 1e9, work / t.low / 1e9
        ratio = self.ceiling * t.median
        yield "ceiling", "%", self.ceiling, ratio / t.high, ratio / t.low
        if self.saved_bytes is not None:
            yield "memory", "MiB", *(self.saved_bytes / 2**20,) * 3


def speedups(group: Sequence[Measurement], provider: str, baseline: str) -> list[float]:
    """Per call, how many times faster `provider` is than `baseline`, by medians."""
    medians = {(m.kernel, m.mode, m.sample["id"], m.dtype, m.provider): m.seconds.median for m in group}
    return [
        medians[(*call, baseline)] / median
        for (*call, who), median in medians.items()
        if who == provider and (*call, baseline) in medians
    ]


def print_group(console: Console, group: Sequence[Measurement], baselines: Sequence[str]) -> None:
    """Print one table and, under it, the geometric means over each of the baselines.

    What all rows have in common (kernel, dtype, mode) is its title, what differs has a column. Host times, which are
    microseconds and nothing else, want a group of their own.
    """
    common = {name: {getattr(m, name) for m in group} for name in ("kernel", "dtype", "mode")}
    title = ", ".join(next(iter(values)) for values in common.values() if len(values) == 1)
    varying = [name for name, values in common.items() if len(values) > 1]
    host = group[0].mode == "host"
    saved = any(m.saved_bytes is not None for m in group)
    words = [*varying, "shape", "provider"]
    headings = ["us" if host else "ms", "20%", "80%"]
    if not host:
        headings += ["GFLOP/s", "GB/s", "% ceiling"] + (["saved MiB"] if saved else [])
    baselines = [b for b in baselines if any(m.provider == b for m in group)]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in (*words, *headings, *(f"x {b}" for b in baselines)):
        table.add_column(heading, justify="left" if heading in words else "right")
    before: list[str] = []
    for m in group:
        # What a row repeats of the one above it is left out.
        where = [*(getattr(m, name) for name in varying), m.sample["id"]]
        said = [text if where[: at + 1] != before[: at + 1] else "" for at, text in enumerate(where)]
        before = where
        ratios = [speedups([n for n in group if _same_call(m, n)], m.provider, b) for b in baselines]
        figures = _figures(m) + ([""] if saved and m.saved_bytes is None else [])
        table.add_row(*said, m.provider, *figures, *(f"{r[0]:.2f}" if r else "" for r in ratios))
    console.print(table)
    for provider in dict.fromkeys(m.provider for m in group):
        ratios = [speedups(group, provider, b) for b in baselines if b != provider]
        means = [f"{geometric_mean(r):.2f}x {b}" for r, b in zip(ratios, (b for b in baselines if b != provider)) if r]
        if provider not in baselines and means:
            console.print(f"{provider}, {title}: geometric mean {', '.join(means)}", markup=False)


def _same_call(a: Measurement, b: Measurement) -> bool:
    return (a.kernel, a.mode, a.dtype, a.sample["id"]) == (b.kernel, b.mode, b.dtype, b.sample["id"])


def _figures(m: Measurement) -> list[str]:
    factor = 1e6 if m.mode == "host" else 1e3
    digits = 1 if m.mode == "host" else 3
    figures = [f"{factor * s:.{digits}f}" for s in (m.seconds.median, m.seconds.low, m.seconds.high)]
    if m.mode == "host":
        return figures
    figures += [
        f"{m.flops / m.seconds.median / 1e9:.1f}",
        f"{m.bytes / m.seconds.median / 1e9:.1f}",
        f"{m.ceiling:.0f}",
    ]
    if m.saved_bytes is not None:
        figures.append(f"{m.saved_bytes / 2**20:.2f}")
    return figures


def print_origin(console: Console, origin: Mapping[str, str]) -> None:
    """What `provenance` found, above the tables."""
    for name, value in origin.items():
        console.print(f"{name:13}{value}", markup=False)


def save(console: Console, path: Path | None, measurements: Sequence[Reported], origin: Mapping[str, str]) -> None:
    """Write the file that was asked for, if one was, and say so."""
    if path is not None:
        write_csv(path, measurements, origin)
        console.print(f"{len(measurements)} measurements written to {path}", markup=False)


def write_csv(path: Path, measurements: Sequence[Reported], origin: Mapping[str, str]) -> None:
    """Write one row per metric of each measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for m in measurements:
            config = {
                **{name: value for name, value in m.sample.items() if name != "id"},
                "dtype": m.dtype,
                **{k: origin[k] for k in ("threads", "isa", "torch", "triton", "commit")},
            }
            config |= m.figures
            for name, unit, *values in m.metrics():
                x = ("shape", " x ".join(m.sizes), m.sample["id"])
                end = (json.dumps(config), origin["machine"], origin["timestamp"], origin["petl_kernels"])
                writer.writerow([m.kernel, m.provider, m.mode, name, unit, *x, *(f"{v:.6g}" for v in values), *end])
