"""The tables of mutations, and the results of having tried them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
LEAST = 10  # mutations of a kernel


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def mutated(self, text: str) -> str:
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.name!r}: what it replaces stands {count} times in {self.file}")
        return text.replace(self.old, self.new)

    @property
    def digest(self) -> str:
        return _digest(self.file, self.old, self.new)

    @property
    def source(self) -> str:
        """Of the file as it is: a result is stale when it has changed."""
        return _digest((ROOT / self.file).read_text())


@dataclass(frozen=True)
class Kernel:
    """`program` is a C++ test, of which failures count that `about` is found in; `tests` are arguments of pytest, run
    one after the other behind it.
    """

    name: str
    program: str | None
    about: str
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]

    @property
    def steps(self) -> tuple[str, ...]:
        return (*((self.program,) if self.program else ()), *self.tests)

    @property
    def language(self) -> str:
        return self.name.partition("/")[0]


def kernels() -> list[Kernel]:
    return [_read(path) for language in ("cpp", "triton", "cuda") for path in sorted((HERE / language).glob("*.toml"))]


def _read(path: Path) -> Kernel:
    table = tomllib.loads(path.read_text())
    mutations = tuple(Mutation(**{"file": table["file"], **entry}) for entry in table["mutation"])
    name = f"{path.parent.name}/{path.stem}"
    return Kernel(name, table.get("program"), table.get("about", ""), tuple(table.get("tests", ())), mutations)


def of_the_package() -> set[str]:
    """The names of the kernels that should have a table: C++, Triton's ops, and what a CUDA source launches."""
    cpp = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {"dispatch", "kernels"}
    triton = {path.parent.name for path in (ROOT / "petl_kernels/ops").glob("*/triton.py")}
    cuda = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    return {f"{k}/{op}" for k, ops in dict(cpp=cpp, triton=triton, cuda=cuda).items() for op in ops}


def results() -> dict[str, dict[str, dict[str, Any]]]:
    """By kernel and name of the mutation: its digests, what caught it (null: nothing did), and in how many seconds."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Keep results, in the order of the tables and without those of mutations that are no more."""
    ordered = {k.name: {m.name: e for m in k.mutations if (e := found.get(k.name, {}).get(m.name))} for k in kernels()}
    text = json.dumps({name: entries for name, entries in ordered.items() if entries}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n")


def record(kernel: Kernel, mutation: Mutation, caught_by: str | None, seconds: float) -> None:
    found = results()
    found.setdefault(kernel.name, {})[mutation.name] = dict(
        mutation=mutation.digest, source=mutation.source, caught_by=caught_by, seconds=round(seconds, 1)
    )
    save(found)


def stale(kernel: Kernel, mutation: Mutation) -> bool:
    """Whether it was never tried, not caught, or the mutation or its file has changed since."""
    entry = results().get(kernel.name, {}).get(mutation.name, {})
    return not entry.get("caught_by") or (entry["mutation"], entry["source"]) != (mutation.digest, mutation.source)
