"""Measurements of the suite, their table, and a plot of each op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu.clocks import Times
from petl_kernels.benchmarking.report import Metric
from petl_kernels.benchmarking.timing import Quantiles


@dataclass(frozen=True)
class Measurement:
    """One provider on one call.

    Attributes:
        times: its four times.
        bytes: what the call has to move, 0 where nobody says.
        copy_rate: bytes per second of a copy in the same run.
        call_sizes: the sizes by which "auto" knows the call.
        saved_bytes, peak_bytes: what autograd keeps, and the most that is in use at once; None where not measured.
    """

    kernel: str
    provider: str
    mode: str
    sample: Mapping[str, Any]
    dtype: str
    times: Times
    bytes: int
    copy_rate: float
    capability: str
    call_sizes: Sequence[int] = ()
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in self.sample.items() if type(value) is int}

    @property
    def figures(self) -> dict[str, Any]:
        sizes = {"sizes": "x".join(map(str, self.call_sizes))} if self.call_sizes else {}
        return {"capability": self.capability, "copy_gbs": self.copy_rate / 1e9, **sizes}

    @property
    def share(self) -> float | None:
        """Percent of the bandwidth of a copy, by the cold time."""
        if self.times.cold is None or not self.bytes:
            return None
        return 100 * self.bytes / self.copy_rate / self.times.cold.median

    def metrics(self) -> Iterator[Metric]:
        """The times, then what the cold one means, then memory."""
        t = self.times
        for name, unit, factor, value in (
            ("gpu_cold", "ms", 1e3, t.cold),
            ("gpu_hot", "ms", 1e3, t.hot),
            ("wall", "ms", 1e3, t.wall),
            ("host", "us", 1e6, t.host),
        ):
            if value is not None:
                yield name, unit, factor * value.median, factor * value.low, factor * value.high
        if t.cold is not None and self.bytes:
            for name, unit, work in (
                ("bandwidth", "GB/s", self.bytes / 1e9),
                ("copy", "%", 100 * self.bytes / self.copy_rate),
            ):
                yield name, unit, work / t.cold.median, work / t.cold.high, work / t.cold.low
        for name, held in (("saved", self.saved_bytes), ("peak", self.peak_bytes)):
            if held is not None:
                yield name, "MiB", *(held / 2**20,) * 3


HEADINGS = ("cold ms", "hot ms", "wall ms", "host us", "% copy", "saved MiB", "peak MiB")


def print_group(console: Console, group: Sequence[Measurement]) -> None:
    """One call in all its modes: every provider's figures."""
    first = group[0]
    table = Table(title=f"{first.kernel} {first.sample['id']} {first.dtype}", title_justify="left")
    for heading in ("mode", "provider", *HEADINGS):
        table.add_column(heading, justify="left" if heading in ("mode", "provider") else "right")
    for m in group:
        t = m.times
        figures = [_number(q, 1e3, 4) for q in (t.cold, t.hot, t.wall)] + [_number(t.host, 1e6, 1)]
        figures.append("" if m.share is None else f"{m.share:.0f}")
        figures += ["" if b is None else f"{b / 2**20:.1f}" for b in (m.saved_bytes, m.peak_bytes)]
        table.add_row(m.mode, m.provider, *figures)
    console.print(table)


def _number(value: Quantiles | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value.median:.{digits}f}"


def plot(measurements: Sequence[Measurement], folder: Path, stem: str, machine: str) -> list[Path]:
    """A picture per op: how many times faster than eager each provider was at each call, cold and by the wall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for kernel in dict.fromkeys(m.kernel for m in measurements):
        modes = {m.mode for m in measurements if m.kernel == kernel}
        mode = next(name for name in ("full", "step", "forward") if name in modes)
        of = [m for m in measurements if m.kernel == kernel and m.mode == mode]
        labels = list(dict.fromkeys(map(_label, of)))
        figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.28 * len(labels)), sharey=True, layout="constrained")
        for axis, metric, title in zip(axes, ("gpu_cold", "wall"), ("time on the GPU, cold L2", "wall time")):
            for provider, points in speedups(of, metric).items():
                axis.plot(list(points.values()), [labels.index(at) for at in points], "o", label=provider)
            axis.axvline(1, color="gray", linewidth=1)
            axis.set(xscale="log", title=title, xlabel="times faster than eager")
        axes[0].set_yticks(range(len(labels)), labels)
        axes[1].legend(fontsize="small")  # which also has the providers that have no time of their own on the GPU
        figure.suptitle(f"{kernel}, {mode}, {machine}")
        written.append(folder / f"{stem}-{kernel}.png")
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def _label(m: Measurement) -> str:
    return f"{m.sample['id']} {m.dtype}"


def speedups(of: Sequence[Measurement], metric: str) -> dict[str, dict[str, float]]:
    """Provider -> call -> eager's median over its own, where both were measured."""
    medians = {(m.provider, _label(m)): value for m in of for name, _, value, *_ in m.metrics() if name == metric}
    found: dict[str, dict[str, float]] = {}
    for (provider, at), value in medians.items():
        if provider != "eager" and ("eager", at) in medians:
            found.setdefault(provider, {})[at] = medians["eager", at] / value
    return found
