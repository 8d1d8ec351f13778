"""The pictures of a record: speed-ups, the roofline with this machine's own ceilings, cost against rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log2, prod
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from petl_kernels.benchmarking.record import Record

Row = Mapping[str, Any]
COLOURS = {
    "eager": "#5c6b73",
    "compile": "#5b8e7d",
    "cpp": "#bc4b51",
    "triton": "#f4a259",
    "cuda": "#7b5ea7",
    "cuda_sm90": "#3f6fb5",
}
OTHER = "#9d8f7a"  # what else is timed beside an op
MARKERS = {"cpp": "o", "triton": "s", "cuda": "^", "cuda_sm90": "D"}
MEANS = {"full": "forward and backward", "forward": "forward", "backward": "backward"}


def missing() -> str | None:
    """Why no plot can be drawn here, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "plots need matplotlib, which is not installed: pip install 'petl-kernels[bench]'"
    return None


def draw(record: Record, out: Path) -> list[Path]:
    """Draw what the record has figures for into a folder, as PNG; in each the widest mode that an op was timed in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    paths = []
    with plt.rc_context(style):
        for name, painter in (("speedup", _speedup), ("roofline", _roofline), ("cost", _cost)):
            if (figure := painter(plt, record)) is not None:
                origin = record["provenance"]
                figure.text(
                    0.995,
                    0.005,
                    f"{origin['machine']}, {origin['threads']} threads, torch {origin['torch']}, "
                    f"petl_kernels {origin['petl_kernels']} ({origin['commit']}), {origin['timestamp']} UTC",
                    ha="right",
                    va="bottom",
                    fontsize=6.5,
                    color="#777777",
                )
                paths.append(out / f"{name}.png")
                figure.savefig(paths[-1], dpi=130)
                plt.close(figure)
    return paths


def _widest(record: Record) -> list[Row]:
    """The rows of each op in one mode: forward and backward together where it was timed, else the forward, ..."""
    found: list[Row] = []
    for op in dict.fromkeys(row["op"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["op"] == op]
        mode = next((mode for mode in MEANS if any(row["mode"] == mode for row in rows)), None)
        found += [row for row in rows if row["mode"] == mode]
    return found


def _of(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _names(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _title(op: str, rows: Sequence[Row]) -> str:
    mode = rows[0]["mode"]
    return op if mode == "full" else f"{op} ({MEANS[mode]})"


def _speedup(plt: Any, record: Record) -> Any:
    """A bar per op and provider, from 1 to the geometric mean over the shapes, each of which is a dot."""
    rows = [row for row in _widest(record) if row["speedup"] is not None]
    dtypes = _names(rows, "dtype")
    bars = {(d, op): [i for i in _names(_of(rows, dtype=d, op=op), "impl") if i != "eager"] for d, op in _pairs(rows)}
    height = sum(max(len(bars.get((d, op), ())) for d in dtypes) + 0.8 for op in _names(rows, "op"))
    if not any(bars.values()):
        return None
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes) + 1, 1.3 + 0.2 * height), sharey=True, squeeze=False
    )
    for axis, dtype in zip(axes[0], dtypes):
        at, places = 0.0, {}
        for op in _names(rows, "op"):
            top = at
            for impl in bars.get((dtype, op), ()):
                found = [row["speedup"] for row in _of(rows, op=op, dtype=dtype, impl=impl)]
                mean, colour = geometric_mean(found), COLOURS.get(impl, OTHER)
                axis.barh(at, log2(mean), height=0.8, color=colour, alpha=0.85)
                if len(found) > 1:
                    axis.plot([log2(f) for f in found], [at] * len(found), "|", color="black", alpha=0.5, ms=6)
                end = max(0.0, log2(mean), *(log2(f) for f in found if len(found) > 1))
                axis.text(end, at, f"  {impl} {mean:.2f}x", va="center", fontsize=8, color=colour)
                at += 1
            at = max(at, top + max(len(bars.get((d, op), ())) for d in dtypes))
            places[_title(op, _of(rows, op=op))] = (top + at - 1) / 2
            at += 0.8
        axis.set_yticks(list(places.values()), list(places))
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.axvline(0, color=COLOURS["eager"], linewidth=1)
        low, high = axis.get_xlim()
        ticks = range(int(low // 1), int(-(-high // 1)) + 1)
        axis.set_xticks(list(ticks), [f"{2.0**tick:g}" for tick in ticks])
        axis.set_xlim(low, high + 0.3 * (high - low))  # room for what is written at the bars
        axis.set(title=dtype, xlabel="times faster than eager PyTorch (log scale)")
    modes = _names(rows, "mode")
    figure.suptitle(f"Speed-up over eager, {MEANS[modes[0]]}; geometric mean over the shapes, a tick each")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _logarithmic(axis: Any) -> None:
    """Both axes, with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(lambda value, _: f"{value:g}")


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["dtype"], row["op"]) for row in rows))


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved as little as it takes for neighbours to be a gap apart; their order stays."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [values[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if not moved:
            break
    return [place for _, place in sorted(zip(order, places))]


def _roofline(plt: Any, record: Record) -> Any:
    """GFLOP/s over FLOP per byte that has to move: eager hollow, our fastest kernel filled, under the roof."""
    rows = _widest(record)
    dtypes = [d for d in _names(rows, "dtype") if d in record["ceilings"]]
    if not dtypes:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(8.2 * len(dtypes), 5.6), squeeze=False)
    palette = dict(zip(_names(rows, "op"), plt.get_cmap("tab10").colors * 3))
    for axis, dtype in zip(axes[0], dtypes):
        roof = record["ceilings"][dtype]
        labels: dict[str, tuple[float, float]] = {}
        for op in _names(_of(rows, dtype=dtype), "op"):
            for shape in _names(_of(rows, dtype=dtype, op=op), "shape"):
                calls = _of(rows, dtype=dtype, op=op, shape=shape)
                eager = next(row for row in calls if row["impl"] == "eager")
                ours = [row for row in calls if row["impl"] in MARKERS]
                best = min(ours or [eager], key=lambda row: row["median_ms"])
                x = eager["flops"] / eager["bytes"]
                style = dict(color=palette[op], zorder=3)
                axis.plot([x, x], [eager["gflops"], best["gflops"]], linewidth=0.8, alpha=0.6, **style)
                axis.plot(x, eager["gflops"], "o", mfc="white", ms=5, **style)
                if ours:
                    axis.plot(x, best["gflops"], MARKERS[best["impl"]], ms=6, **style)
                if best["gflops"] > labels.get(op, (0, 0))[1]:
                    labels[op] = (x, best["gflops"])
        _roof(axis, roof, [row["flops"] / row["bytes"] for row in _of(rows, dtype=dtype)])
        _label_points(axis, labels, palette)
        _logarithmic(axis)
        axis.set(title=dtype, xlabel="FLOP per byte that has to be read or written", ylabel="GFLOP/s")
    kernels = {row["impl"] for row in rows if row["impl"] in MARKERS}
    filled = ", ".join(
        f"{ {'o': 'circle', 's': 'square', '^': 'triangle', 'D': 'diamond'}[MARKERS[k]] } {k}"
        for k in MARKERS
        if k in kernels
    )
    figure.suptitle(f"Roofline of {MEANS[rows[0]['mode']]}: hollow eager PyTorch, filled our fastest kernel ({filled})")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _roof(axis: Any, roof: Mapping[str, float], intensities: Sequence[float]) -> None:
    """The ceilings measured in this run: a copy's bytes on the slope, a matmul's operations on the flat."""
    ridge = roof["gflops"] / roof["gbs"]
    left, right = min([*intensities, ridge / 4]) / 2, max([*intensities, ridge * 4]) * 3
    axis.plot([left, ridge, right], [left * roof["gbs"], roof["gflops"], roof["gflops"]], color="black", linewidth=1.2)
    axis.text(right, roof["gflops"] * 1.08, f"matmul {roof['gflops']:,.0f} GFLOP/s", ha="right", fontsize=8)
    middle = (left * ridge) ** 0.5
    axis.annotate(
        f"copy {roof['gbs']:,.0f} GB/s",
        (middle, middle * roof["gbs"]),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _label_points(axis: Any, labels: Mapping[str, tuple[float, float]], palette: Mapping[str, Any]) -> None:
    """The op's name beside its highest point; names about as far right as one another keep their distance."""
    columns: list[list[str]] = []
    for op in sorted(labels, key=lambda op: labels[op][0]):
        if columns and labels[op][0] < 2 * labels[columns[-1][0]][0]:
            columns[-1].append(op)
        else:
            columns.append([op])
    for ops in columns:
        right = max(labels[op][0] for op in ops)
        for op, place in zip(ops, _spread([log2(labels[op][1]) for op in ops], 0.28)):
            axis.annotate(
                op,
                labels[op],
                xytext=(right * 1.25, 2**place),
                fontsize=8,
                va="center",
                color=palette[op],
                arrowprops=dict(arrowstyle="-", color=palette[op], linewidth=0.5, shrinkA=0, shrinkB=3),
            )


def _cost(plt: Any, record: Record) -> Any:
    """Time over rows on log axes, a panel per op, at the sizes of which most numbers of rows were timed."""
    rows = _widest(record)
    dtype = next(iter(_names(rows, "dtype")), "")
    series = {op: found for op in _names(rows, "op") if (found := _series(_of(rows, op=op, dtype=dtype)))}
    if not series:
        return None
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 0.7 + 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, (op, found) in zip(axes.flat, series.items()):
        ends = {}
        for impl in _names(found, "impl"):
            points = sorted((_rows_of(row), row["median_ms"]) for row in found if row["impl"] == impl)
            x, y = zip(*points)
            axis.plot(x, y, ".-", color=COLOURS.get(impl, OTHER), linewidth=1.3, markersize=5)
            ends[impl] = (x[-1], log2(y[-1]))
        _logarithmic(axis)
        low, high = axis.get_ylim()
        places = _spread([end for _, end in ends.values()], 0.07 * log2(high / low))
        for (impl, (x, _)), place in zip(ends.items(), places):
            axis.text(x * 1.15, 2**place, impl, va="center", fontsize=8, color=COLOURS.get(impl, OTHER))
        axis.set_xlim(right=axis.get_xlim()[1] * 2.5)
        sizes = {k: v for k, v in found[0]["sample"].items() if type(v) is int and k != "n"}
        axis.set_title(", ".join([_title(op, found), *(f"{k} = {v}" for k, v in sizes.items())]), fontsize=9)
        axis.set(xlabel="rows N", ylabel="ms")
    figure.suptitle(f"Cost against N, {MEANS[rows[0]['mode']]}, {dtype}")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _rows_of(row: Row) -> int:
    """All rows of a call: an op may count samples, of several tokens each."""
    return row["sample"]["n"] * prod(row["sample"].get("tokens", ()))


def _series(rows: Sequence[Row]) -> list[Row]:
    """Of one op, the rows of the calls that differ in N alone and are most; none where that is fewer than three."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["sample"].items() if key != "n"}
        groups.setdefault(str(sorted(rest.items())), []).append(row)
    found = max(groups.values(), key=lambda group: len({row["shape"] for row in group}), default=[])
    return found if len({row["shape"] for row in found}) >= 3 else []
