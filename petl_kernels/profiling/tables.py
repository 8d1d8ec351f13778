"""The tables of a profile, as rows of text; the terminal and the HTML report show the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from petl_kernels.profiling.plots import measured, segments

Rows = list[list[str]]  # the first row is the head
MODULES = 12
NONE = "-"


def summary_table(record: dict[str, Any]) -> Rows:
    """A row per figure, a column per variant."""
    variants = measured(record)
    frozen = variants.get("frozen")
    eager = variants.get("eager")

    def against(name: str, variant: dict[str, Any]) -> str:
        if eager is None or variant is frozen:
            return NONE
        return f"{eager['step_ms'] / variant['step_ms']:.2f}x"

    figures: list[tuple[str, Callable[[str, dict[str, Any]], str]]] = [
        ("step, ms (median)", lambda n, v: f"{v['step_ms']:,.2f}"),
        ("20 % to 80 % of the steps, ms", lambda n, v: f"{v['low_ms']:,.2f} to {v['high_ms']:,.2f}"),
        ("speed of eager's step", against),
        ("above the frozen step, ms", lambda n, v: _number(v["above_frozen_ms"]) if v is not frozen else NONE),
        ("host time, ms", lambda n, v: f"{v['host_ms']:,.2f}"),
        ("operators launched", lambda n, v: _number(v["operators"], 0)),
        ("of these, ops of petl_kernels", lambda n, v: NONE if v["operators"] is None else _package(v)),
        ("GPU kernels launched", lambda n, v: _number(v["kernel_launches"], 0)),
        ("saved activations, MiB", lambda n, v: f"{v['saved_mib']:,.2f}"),
        ("peak memory of the step, MiB", lambda n, v: _number(v["peak_mib"])),
        ("trained parameters", lambda n, v: f"{v['trained']:,}"),
        ("gradients off eager's by", lambda n, v: _difference(v)),
    ]
    rows = [["", *variants]]
    rows += [[label, *(figure(name, v) for name, v in variants.items())] for label, figure in figures]
    return [rows[0], *(row for row in rows[1:] if any(cell != NONE for cell in row[1:]))]


def step_table(record: dict[str, Any]) -> Rows:
    """Milliseconds of each part of the step, per variant."""
    variants = {name: (variant, segments(variant)) for name, variant in measured(record).items()}
    rows = [["ms", *variants]]
    for part in next(iter(variants.values()))[1] if variants else ():
        row = [part]
        for variant, found in variants.values():
            known = variant["adapters_ms"] is not None or not part.startswith("adapters")
            row.append(f"{found[part]:,.2f}" if known else NONE)
        rows.append(row)
    return rows


def saved_table(record: dict[str, Any]) -> Rows:
    """MiB that each module saves for the backward pass, per variant; the largest first."""
    variants = {n: v["saved_by_module"] for n, v in measured(record).items() if v["saved_by_module"] is not None}
    names = sorted(
        {m for v in variants.values() for m in v}, key=lambda m: -max(v.get(m, 0) for v in variants.values())
    )
    rows = [["module", *variants]]
    rows += [[name, *(f"{v.get(name, 0):,.2f}" for v in variants.values())] for name in names[:MODULES]]
    if rest := names[MODULES:]:
        sums = (sum(v.get(name, 0) for name in rest) for v in variants.values())
        rows.append([f"others ({len(rest)})", *(f"{size:,.2f}" for size in sums)])
    return rows


def fuse_table(record: dict[str, Any]) -> Rows:
    """What `fuse` changes, and what it leaves and why; modules that differ in a number only are one row."""
    report = record["fuse"] or {"fused": {}, "skipped": {}, "unavailable": {}}
    own = [name for name, site in record["adapters"].items() if site["kind"] == "petl_kernels"]
    rows = [["modules", "", "fused", "what, or why not"]]
    rows += [[*row[:2], "runs on this package's ops already", row[2]] for row in _grouped(_classes(record, own))]
    rows += [[*row[:2], "yes", row[2]] for row in _grouped(report["fused"])]
    rows += [[*row[:2], "no", row[2]] for row in _grouped(report["skipped"])]
    return rows + [[name, "", "no", why] for name, why in report["unavailable"].items()]


def adapters_table(record: dict[str, Any]) -> Rows:
    """Which modules count as adapters."""
    places = {name: f"{site['class']} ({site['kind']})" for name, site in record["adapters"].items()}
    return [["modules", "", "class"], *_grouped(places)]


def _classes(record: dict[str, Any], names: list[str]) -> dict[str, str]:
    return {name: record["adapters"][name]["class"] for name in names}


def _grouped(said: dict[str, str]) -> Rows:
    """name -> text, with names that differ in a number only in one row: the name, how many, the text."""
    groups: dict[tuple[str, str], int] = {}
    for name, text in said.items():
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), text)
        groups[key] = groups.get(key, 0) + 1
    return [[name, f"x {count}", text] for (name, text), count in groups.items()]


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _package(variant: dict[str, Any]) -> str:
    return f"{sum(variant['package_operators'].values()):,}"


def _difference(variant: dict[str, Any]) -> str:
    found = variant["difference"]
    return NONE if not found else f"{found['gradients']:.1e}"
