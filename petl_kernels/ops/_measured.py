"""What "auto" takes on a GPU: `crossover.csv`, which implementation was the fastest at each shape that was measured.

`python benchmarks/crossover.py benchmarks/results/*.csv` writes that file. A call follows the nearest measured shape of
its op and dtype on a device of its name, or else of its compute capability. Where none is near, "auto" takes the
reference, as it does on a GPU that was never measured.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from petl_kernels.ops._assume import assume_constant

PATH = Path(__file__).parents[1] / "crossover.csv"
COLUMNS = ("device", "capability", "op", "dtype", "sizes", "eager", "compiled")
UNKNOWN = "?"  # instead of names: the baseline was not timed at this shape
GPU = "cuda"  # the type of the devices that the table is about
FACTOR = 4.0  # measured shapes lie up to four times apart; further away nothing is known


class Row(NamedTuple):
    """One measured shape: the implementations that beat the reference there, best first.

    Attributes:
        device, capability: as torch names them, "9.0" being a capability.
        sizes: as the op's `sizes` gives them, the rows first.
        eager: against eager PyTorch, by the wall time of ordinary launches.
        compiled: against `torch.compile` of the reference, by the time on the GPU; None where that was not timed.
    """

    device: str
    capability: str
    op: str
    dtype: str
    sizes: tuple[int, ...]
    eager: tuple[str, ...]
    compiled: tuple[str, ...] | None


class Finding(NamedTuple):
    """What the table says of a call: implementations, best first, and where that comes from."""

    impls: tuple[str, ...]
    source: str


@cache
def table() -> tuple[Row, ...]:
    """The rows of the file."""
    with PATH.open(newline="") as file:
        return tuple(_row(record) for record in csv.DictReader(file))


def _row(record: dict[str, str]) -> Row:
    sizes = tuple(map(int, record["sizes"].split("x")))
    compiled = None if record["compiled"] == UNKNOWN else tuple(record["compiled"].split())
    where = (record["device"], record["capability"], record["op"], record["dtype"])
    return Row(*where, sizes, tuple(record["eager"].split()), compiled)


@cache
def device_of(index: int | None) -> tuple[str, str]:
    """Name and compute capability of a GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"{major}.{minor}"


@cache
def _rows(op: str, index: int | None, dtype: torch.dtype) -> tuple[Row, ...]:
    """What was measured of an op in a dtype on this device, or if nothing was, on those of its capability."""
    name, capability = device_of(index)
    # float16 moves the bytes of bfloat16 and is multiplied at its rate.
    key = short(torch.bfloat16 if dtype == torch.float16 else dtype)
    rows = [row for row in table() if row.op == op and row.dtype == key]
    return tuple([r for r in rows if r.device == name] or [r for r in rows if r.capability == capability])


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def _distance(a: Sequence[int], b: Sequence[int]) -> tuple[float, float]:
    """By what power of two shapes differ: in the size that differs most, and in all of them together."""
    apart = [abs(math.log2(max(m, 1) / max(n, 1))) for m, n in zip(a, b, strict=True)]
    return max(apart), sum(apart)


@lru_cache(4096)
def eager(op: str, index: int | None, dtype: torch.dtype, sizes: tuple[int, ...]) -> Finding:
    """What to take for a call of ordinary PyTorch."""
    rows = _rows(op, index, dtype)
    if not rows:
        return Finding((), _unmeasured(op, index, dtype))
    # More rows than were ever measured are more of the same.
    known = (min(sizes[0], max(row.sizes[0] for row in rows)), *sizes[1:])
    nearest = min(rows, key=lambda row: _distance(row.sizes, known)[1])
    if _distance(nearest.sizes, known)[0] > math.log2(FACTOR):
        return Finding((), f"the nearest shape measured, {_text(nearest.sizes)}, is over {FACTOR:.0f} times off")
    return Finding(nearest.eager, f"measured on {nearest.device} at {_text(nearest.sizes)} in {nearest.dtype}")


@lru_cache(4096)
def compiled(op: str, index: int | None, dtype: torch.dtype, widths: tuple[int, ...]) -> Finding:
    """What to take in a compiled graph, which serves any number of rows: what won at every number of them.

    Args:
        op, index, dtype: as of `eager`.
        widths: the sizes without the rows, which would become a condition of the graph.
    """
    rows = [row for row in _rows(op, index, dtype) if row.compiled is not None]
    if not rows:
        return Finding((), _unmeasured(op, index, dtype))
    nearest = min((row.sizes[1:] for row in rows), key=lambda w: _distance(w, widths)[1])
    if _distance(nearest, widths)[0] > math.log2(FACTOR):
        return Finding((), f"the nearest widths measured, {_text(nearest)}, are over {FACTOR:.0f} times off")
    those = [row for row in rows if row.sizes[1:] == nearest]
    most = max(those, key=lambda row: row.sizes[0])
    always = tuple(name for name in most.compiled or () if all(name in (row.compiled or ()) for row in those))
    return Finding(always, f"measured on {most.device} at widths {_text(nearest)} in {most.dtype}, compiled")


@assume_constant
def compiled_names(op: str, index: int | None, dtype: torch.dtype, *widths: int) -> str:
    """The implementations of `compiled` with spaces between them: a constant, as a compiler wants it."""
    return " ".join(compiled(op, index, dtype, widths).impls)


def _unmeasured(op: str, index: int | None, dtype: torch.dtype) -> str:
    return f"{op} in {short(dtype)} is not measured on {' ('.join(device_of(index))})"


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
