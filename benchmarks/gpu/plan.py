"""What is measured, in which order, and when it ends."""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product, zip_longest
from math import prod
from typing import Any

from petl_kernels.testing import Case

ROWS = (512, 4096, 12608, 16384, 65536)
WIDTHS = (384, 768, 1024, 4096, 8192)
RANKS = (8, 16, 64, 128, 256)
CENTRE = (4096, 768, 64)
EIGHTH = 8  # channels that are chosen: one of so many
# The adapter with which LoRA's kernels can be compared: no bias, no activation, added to what the linear gave.
LORA = dict(residual="other", b_down=False, b_up=False, activation="identity")


@dataclass(frozen=True)
class Unit:
    """A call of an op in a dtype; `lora` where it is one that LoRA's kernels compute too."""

    case: Case
    sample: Mapping[str, Any]
    dtype: str
    lora: bool = False

    @property
    def label(self) -> str:
        return f"{self.case.name} {self.sample['id']} {self.dtype}"


@dataclass(frozen=True)
class Grid:
    """The sizes that are combined."""

    rows: Sequence[int] = ROWS
    widths: Sequence[int] = WIDTHS
    ranks: Sequence[int] = RANKS
    centre: tuple[int, int, int] = CENTRE

    def shapes(self, axes: int) -> list[tuple[int, ...]]:
        """Every shape of the first two or all three axes: the centre, what differs in one size, in two, in all.

        Each class is in an order of its own that is random but always the same, so that where time runs out a part is
        left that says something of the whole.
        """
        found = list(product(*(self.rows, self.widths, self.ranks)[:axes]))
        random.Random(0).shuffle(found)
        return sorted(found, key=lambda shape: sum(a != b for a, b in zip(shape, self.centre)))


REHEARSED = Grid((8, 24), (16, 32), (4, 8), (24, 16, 4))


def sample(case: Case, n: int, d: int, r: int | None, **form: Any) -> dict[str, Any]:
    """A call of n rows: the case's first benchmark call with other sizes, the rows being those of all its samples."""
    first = case.bench[0]
    sizes = {"n": max(1, n // prod(first.get("tokens", ()))), "d": d, "r": r, "k": d // EIGHTH}
    found = {key: sizes.get(key, value) if type(value) is int else value for key, value in first.items()}
    found |= form
    numbers = "x".join(str(v) for v in found.values() if type(v) is int)
    return found | {"id": f"lora-{numbers}" if form else numbers}


def units(cases: Sequence[Case], grid: Grid) -> list[Unit]:
    """All there is to measure, what matters most first: three calls of the first op for each one of every other."""
    return list(_in_turn([_of(case, grid) for case in cases]))


def _of(case: Case, grid: Grid) -> Iterator[Unit]:
    ranked = "r" in case.bench[0]
    for index, (n, d, *rest) in enumerate(grid.shapes(3 if ranked else 2)):
        r = rest[0] if rest else None
        yield Unit(case, sample(case, n, d, r), "bfloat16")
        if index % 4 == 0:
            yield Unit(case, sample(case, n, d, r), "float32")
        if index % 3 == 0 and case.name == "bottleneck_adapter":
            yield Unit(case, sample(case, n, d, r, **LORA), "bfloat16", lora=True)


def _in_turn(queues: Sequence[Iterator[Unit]]) -> Iterator[Unit]:
    first, *others = queues
    threes = iter(lambda: list(islice(first, 3)), [])
    for many, one in zip_longest(threes, zip_longest(*others)):
        yield from chain(many or (), (unit for unit in one or () if unit is not None))


@dataclass
class Budget:
    """Seconds for the suite; what begins must be expected to end within them.

    Args:
        seconds: from now on.
        clock: as `time.monotonic`.
        expected: kind -> seconds that one of it takes, until one has been seen.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    expected: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=8))
        self._spent: dict[str, float] = defaultdict(float)

    def allows(self, kind: str, until: float = 1.0, share: float = 1.0) -> bool:
        """Whether one more of a kind, by the longest of the last ones, ends in time.

        Args:
            kind: a name for things that take about as long as one another.
            until: the part of the time that may have passed when it ends.
            share: the part of the time that all of this kind may take together.
        """
        longest = max(self._recent[kind], default=self.expected.get(kind, 0.0))
        in_time = self.clock() - self._start + longest <= until * self.seconds
        return in_time and self._spent[kind] + longest <= share * self.seconds

    def run(self, kind: str, work: Callable[[], Any]) -> Any:
        """Do it and keep in mind how long it took."""
        start = self.clock()
        try:
            return work()
        finally:
            took = self.clock() - start
            self._recent[kind].append(took)
            self._spent[kind] += took
