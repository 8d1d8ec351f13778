"""A run as one record of plain JSON values: where it comes from, what it found, what it left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petl_kernels.benchmarking.report import Measurement
from petl_kernels.benchmarking.timing import Ceilings

Record = dict[str, Any]
IDENTITY = ("op", "impl", "mode", "shape", "dtype")  # by which rows of two records are the same measurement


def record(
    measurements: Sequence[Measurement],
    origin: Mapping[str, str],
    settings: Mapping[str, Any],
    ceilings: Mapping[str, Ceilings],
    left_out: Sequence[str],
    wrong: Sequence[str] = (),
) -> Record:
    """The record.

    Returns:
        "provenance", "settings", "ceilings" (dtype -> GFLOP/s of a matmul, GB/s of a copy), "rows" (per measurement its
        identity, sizes, times, rates and how many times faster than eager it was), "left_out" and "wrong" (what
        computes something else, in which case nothing was timed).
    """
    eager = {_call(m): m.seconds.median for m in measurements if m.provider == "eager"}
    return {
        "provenance": dict(origin),
        "settings": dict(settings),
        "ceilings": {name: {"gflops": c.flops / 1e9, "gbs": c.bytes / 1e9} for name, c in ceilings.items()},
        "rows": [_row(m, eager.get(_call(m))) for m in measurements],
        "left_out": list(left_out),
        "wrong": list(wrong),
    }


def _call(m: Measurement) -> tuple[str, ...]:
    return m.kernel, m.mode, m.sample["id"], m.dtype


def _row(m: Measurement, eager: float | None) -> dict[str, Any]:
    t = m.seconds
    row = {
        "op": m.kernel,
        "impl": m.provider,
        "mode": m.mode,
        "shape": m.sample["id"],
        "dtype": m.dtype,
        "sample": {name: value for name, value in m.sample.items() if name != "id"},
        "median_ms": t.median * 1e3,
        "low_ms": t.low * 1e3,
        "high_ms": t.high * 1e3,
        "speedup": None if eager is None else eager / t.median,
    }
    if m.ceilings is not None:  # the host's cost says nothing of the work
        rates = {"gflops": m.flops / t.median / 1e9, "gbs": m.bytes / t.median / 1e9, "ceiling_percent": m.ceiling}
        row |= {"flops": m.flops, "bytes": m.bytes, **rates, "saved_bytes": m.saved_bytes}
    return row


def load(path: Path) -> Record:
    """A record that was written before.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for row in found["rows"]:
            _ = [row[key] for key in (*IDENTITY, "median_ms")]
        _ = [found["provenance"][key] for key in ("machine", "isa", "threads")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of `petl-kernels bench`: {type(error).__name__}: {error}") from None
    return found
