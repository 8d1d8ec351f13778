"""The pictures of a profile: where the step goes, what is saved for the backward pass, memory over the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "backbone forward": "#9db4c0",
    "backbone backward": "#5c6b73",
    "adapters forward": "#f4a259",
    "adapters backward": "#bc4b51",
    "optimizer": "#5b8e7d",
    "data": "#c9cba3",
}
VARIANTS = {
    "frozen": "#9db4c0",
    "eager": "#5c6b73",
    "compiled": "#5b8e7d",
    "fused": "#bc4b51",
    "fused+compiled": "#f4a259",
}
MODULES = 10  # of the bars of saved activations; the others are one


def missing() -> str | None:
    """Why no plot can be drawn here, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "plots need matplotlib, which is not installed: pip install 'petl-kernels[profile]', or pass --no-plots"
    return None


def segments(variant: dict[str, Any]) -> dict[str, float]:
    """Where a variant's step goes, in milliseconds; compiled, adapters are inside the backbone."""
    parts, adapters = variant["parts_ms"], variant["adapters_ms"] or {"forward": 0.0, "backward": 0.0}
    return {
        "backbone forward": max(0.0, parts["forward"] - adapters["forward"]),
        "backbone backward": max(0.0, parts["backward"] - adapters["backward"]),
        "adapters forward": adapters["forward"],
        "adapters backward": adapters["backward"],
        "optimizer": parts["optimizer"],
        "data": parts["data"],
    }


def measured(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that ran."""
    return {name: variant for name, variant in record["variants"].items() if "step_ms" in variant}


def draw(record: dict[str, Any], out: Path) -> list[Path]:
    """Draw all plots of a record into a folder, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    paths = []
    for name, painter in (("step", _step), ("saved", _saved), ("memory", _memory)):
        figure, axes = plt.subplots(figsize=(9, 3.6))
        if painter(axes, measured(record)):
            figure.tight_layout()
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def _step(axes: Any, variants: dict[str, dict[str, Any]]) -> bool:
    names = list(variants)[::-1]
    ends = [0.0] * len(names)
    for segment, colour in COLOURS.items():
        widths = [segments(variants[name])[segment] for name in names]
        axes.barh(names, widths, left=ends, color=colour, label=segment, height=0.65)
        ends = [end + width for end, width in zip(ends, widths)]
    for at, (name, end) in enumerate(zip(names, ends)):
        note = ", adapters inside the backbone" if variants[name]["adapters_ms"] is None and name != "frozen" else ""
        axes.text(end, at, f"  {end:,.1f} ms{note}", va="center")
    axes.set(xlabel="ms, medians of steps that wait between their parts", title="Where the step goes")
    axes.set_xlim(right=max(ends) * 1.35)
    axes.legend(ncols=1, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _saved(axes: Any, variants: dict[str, dict[str, Any]]) -> bool:
    by_module = {name: v["saved_by_module"] for name, v in variants.items() if v["saved_by_module"] is not None}
    if not by_module:
        return False
    largest = {m: max(v.get(m, 0.0) for v in by_module.values()) for v in by_module.values() for m in v}
    modules = sorted(largest, key=lambda m: -largest[m])[:MODULES][::-1]
    height = 0.8 / len(by_module)
    for at, (name, sizes) in enumerate(by_module.items()):
        places = [i - at * height + 0.4 for i in range(len(modules))]
        widths = [sizes.get(module, 0.0) for module in modules]
        axes.barh(places, widths, height, color=VARIANTS[name], label=f"{name}, {variants[name]['saved_mib']:,.1f} MiB")
    axes.set_yticks([i + 0.4 - height * (len(by_module) - 1) / 2 for i in range(len(modules))], modules, fontsize=8)
    axes.set(xlabel="MiB saved for the backward pass", title="Saved activations by module")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.figure.set_size_inches(9, 1.4 + 0.38 * len(modules))
    return True


def _memory(axes: Any, variants: dict[str, dict[str, Any]]) -> bool:
    curves = {name: v["memory"] for name, v in variants.items() if v["memory"]}
    for name, curve in curves.items():
        # Each over its own duration: under the profiler, time is not what it is without.
        last = curve[-1][0] or 1.0
        x, y = [100 * at / last for at, _ in curve], [size for _, size in curve]
        label = f"{name}, peak {variants[name]['peak_mib']:,.1f} MiB"
        axes.plot(x, y, color=VARIANTS[name], label=label, linewidth=1.3, drawstyle="steps-post")
    axes.set(xlabel="% of the step", ylabel="MiB", title="Memory allocated since the step began")
    axes.legend(fontsize=8, frameon=False)
    return bool(curves)
