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
SHAPES = {"cpp": "circle", "triton": "square", "cuda": "triangle", "cuda_sm90": "diamond"}
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
        if axis is axes[0][0]:  # which the others share
            axis.invert_yaxis()
        axis.axvline(0, color=COLOURS["eager"], linewidth=1)
        low, high = axis.get_xlim()
        ticks = range(int(low // 1), int(-(-high // 1)) + 1)
        axis.set_xticks(list(ticks), [f"{2.0**tick:g}" for tick in ticks])
        axis.set_xlim(low, high + 0.3 * (high - low))  # room for what is written at the bars
        axis.set(title=dtype, xlabel="times faster than eager PyTorch (log scale)")
    modes = _names(rows, "mode")
    figure.suptitle(f"Speed-up over eager, {MEANS[modes[0]]}; geometric mean over the shapes, a tick for each")
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
    """GFLOP/s over FLOP per byte that has to move, under the roof.

    Of each op the call that moves most, eager and our fastest kernel; of its other calls a faint dot for the kernel.
    """
    rows = _widest(record)
    dtypes = [d for d in _names(rows, "dtype") if d in record["ceilings"]]
    if not dtypes:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(7.4 * len(dtypes), 6.2), squeeze=False)
    palette = dict(zip(_names(rows, "op"), plt.get_cmap("tab10").colors * 3))
    for axis, dtype in zip(axes[0], dtypes):
        here = _of(rows, dtype=dtype)
        _logarithmic(axis)
        low = min(row["gflops"] for row in here if row["impl"] == "eager" or row["impl"] in MARKERS)
        _roof(axis, record["ceilings"][dtype], [row["flops"] / row["bytes"] for row in here], low)
        largest = {op: max(_of(here, op=op), key=lambda row: row["bytes"]) for op in _names(here, "op")}
        # Ops of the same intensity stand beside one another, no more than it takes to tell them apart.
        places = _spread([log2(row["flops"] / row["bytes"]) for row in largest.values()], 0.16)
        for (op, row), place in zip(largest.items(), places):
            _calls(axis, _of(here, op=op), row["shape"], 2**place, palette[op])
        _name_below(axis, dict(zip(largest, places)), _of(here, impl="eager"), largest, palette)
        axis.set(title=dtype, xlabel="FLOP per byte that has to be read or written", ylabel="GFLOP/s")
    kernels = [f"{SHAPES[name]} {name}" for name in MARKERS if any(row["impl"] == name for row in rows)]
    what = f"filled our fastest kernel ({', '.join(kernels)})" if kernels else "and no kernel"
    figure.suptitle(
        f"Roofline, {MEANS[rows[0]['mode']]}\n"
        f"the largest call of each op: hollow eager, {what}; faint dots: its other calls",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _calls(axis: Any, rows: Sequence[Row], largest: str, x: float, colour: Any) -> None:
    """The points of an op; `x` is the place of those of its largest call."""
    for shape in _names(rows, "shape"):
        calls = _of(rows, shape=shape)
        kernels = [row for row in calls if row["impl"] in MARKERS]
        best = min(kernels, key=lambda row: row["median_ms"], default=None)
        if shape == largest:
            eager = _of(calls, impl="eager")[0]["gflops"]
            if best is not None:
                axis.plot([x, x], [eager, best["gflops"]], color=colour, linewidth=1, zorder=2)
                axis.plot(x, best["gflops"], MARKERS[best["impl"]], color=colour, ms=7, zorder=3)
            axis.plot(x, eager, "o", color=colour, mfc="white", ms=6, zorder=3)
        elif best is not None:
            axis.plot(best["flops"] / best["bytes"], best["gflops"], ".", color=colour, alpha=0.3, ms=6, mew=0)


def _roof(axis: Any, roof: Mapping[str, float], intensities: Sequence[float], low: float) -> None:
    """The ceilings measured in this run: a copy's bytes on the slope, a matmul's operations on the flat."""
    ridge = roof["gflops"] / roof["gbs"]
    left, right = min([*intensities, ridge / 4]) / 2, max([*intensities, ridge * 4]) * 2
    axis.plot([left, ridge, right], [left * roof["gbs"], roof["gflops"], roof["gflops"]], color="black", linewidth=1.2)
    axis.text(right, roof["gflops"] * 1.08, f"matmul {roof['gflops']:,.0f} GFLOP/s", ha="right", fontsize=8)
    middle = (left * ridge) ** 0.5
    place = dict(xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=8)
    axis.annotate(f"copy {roof['gbs']:,.0f} GB/s", (middle, middle * roof["gbs"]), **place)
    bottom = min(low, left * roof["gbs"])
    axis.set(
        xlim=(left, right), ylim=(bottom * (bottom / roof["gflops"]) ** 0.45, 2 * roof["gflops"])
    )  # room for names


def _name_below(
    axis: Any, places: Mapping[str, float], eager: Sequence[Row], largest: Mapping[str, Row], palette: Mapping[str, Any]
) -> None:
    """The ops' names along the bottom, upright, each with a line to its lower point."""
    low, high = axis.get_xlim()
    for (op, at), name_at in zip(places.items(), _spread(list(places.values()), 0.036 * log2(high / low))):
        (point,) = (row for row in eager if row["op"] == op and row["shape"] == largest[op]["shape"])
        axis.annotate(
            op,
            (2**at, point["gflops"]),
            xytext=(2**name_at, 0.02),
            textcoords=axis.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color=palette[op],
            arrowprops=dict(arrowstyle="-", color=palette[op], linewidth=0.5, linestyle=":", shrinkB=4),
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
        counts = sorted({_rows_of(row) for row in found})
        axis.set_xticks(counts, [str(count) for count in counts], fontsize=8)
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
