"""Two records compared, row by row: what became slower, and what the comparison does not cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any

from petl_kernels.benchmarking.provenance import UNKNOWN
from petl_kernels.benchmarking.record import IDENTITY, Record
from petl_kernels.testing import CASES

SAME_MACHINE = ("machine", "isa", "threads")
VERSIONS = ("torch", "triton", "petl_kernels")
NAMED = 5  # rows that a remark names before it counts the others


@dataclass(frozen=True)
class Change:
    """One row of both records."""

    op: str
    impl: str
    mode: str
    shape: str
    dtype: str
    old_ms: float
    new_ms: float

    @property
    def percent(self) -> float:
        """How much longer it takes now."""
        return 100 * (self.new_ms / self.old_ms - 1)


@dataclass
class Comparison:
    """What two records say together.

    Attributes:
        changes: the kernels' rows that both have.
        drift: what eager and its compilation take now over what they took then, a geometric mean over the rows that
            both have; None without any. It is the machine's own change, which says how far to trust the others.
        remarks: what is not compared, or not to be trusted, and why.
    """

    changes: list[Change] = field(default_factory=list)
    drift: float | None = None
    remarks: list[str] = field(default_factory=list)

    def slower(self, percent: float) -> list[Change]:
        """The rows whose median rose by more than so many percent, worst first."""
        return sorted((c for c in self.changes if c.percent > percent), key=lambda c: -c.percent)

    def as_json(self, percent: float | None) -> dict[str, Any]:
        """As plain values; with the regressions where a limit was given."""
        changes = [{**asdict(c), "percent": c.percent} for c in self.changes]
        slower = None if percent is None else [{**asdict(c), "percent": c.percent} for c in self.slower(percent)]
        return {"changes": changes, "slower": slower, "drift": self.drift, "remarks": self.remarks}


def compare(old: Record, new: Record) -> Comparison:
    """Compare the rows that are the same measurement (op, implementation, mode, shape, dtype) on the same machine."""
    then, now = old["provenance"], new["provenance"]
    found = Comparison(remarks=_remarks(then, now))
    if differing := [key for key in SAME_MACHINE if then[key] != now[key]]:
        said = "; ".join(f"{key} {then[key]!r} then, {now[key]!r} now" for key in differing)
        found.remarks.append(f"another machine, so nothing is compared: {said}")
        return found
    before, after = ({_key(row): row["median_ms"] for row in record["rows"]} for record in (old, new))
    found.remarks += _missing(set(before) - set(after), "in the old file, not measured now")
    found.remarks += _missing(set(after) - set(before), "measured now, not in the old file")
    kernels = {case.name: case.op.impls for case in CASES}
    drifts = []
    for key in (key for key in after if key in before):
        if key[1] in kernels.get(key[0], ()):
            found.changes.append(Change(*key, before[key], after[key]))
        elif key[1] in ("eager", "compile"):
            drifts.append(after[key] / before[key])
    found.drift = geometric_mean(drifts) if drifts else None
    return found


def _key(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    op, impl, mode, shape, dtype = (row[name] for name in IDENTITY)
    return op, impl, mode, shape, dtype


def _remarks(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What the two origins say of the comparison's worth."""
    remarks = []
    for origin, which in ((then, "the old file"), (now, "this run")):
        commit = origin.get("commit", UNKNOWN)
        if commit == UNKNOWN:
            remarks.append(f"{which} names no commit")
        elif commit.endswith("+"):
            remarks.append(f"{which} was measured on changes that its commit {commit[:-1]} does not have")
    for name in VERSIONS:
        if then.get(name) != now.get(name):
            remarks.append(f"{name} {then.get(name)} then, {now.get(name)} now")
    return remarks


def _missing(keys: set[tuple[str, str, str, str, str]], what: str) -> list[str]:
    if not keys:
        return []
    labels: Sequence[str] = sorted(" ".join((op, shape, dtype, mode, impl)) for op, impl, mode, shape, dtype in keys)
    rest = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return [f"{what}: {', '.join(labels[:NAMED])}{rest}"]
