"""Try the mutations that are new or whose file has changed: `make mutations [KERNELS=...]`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from . import readme, tables
from .workshop import Invalid, Workshop


def main(
    kernel: Annotated[list[str] | None, typer.Option(help="Of these: cpp/layer_norm, or all that begins so.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those that have a result which still holds, too.")] = False,
    work: Annotated[Path, typer.Option(help="Where the copy and its build are.")] = tables.ROOT / "build" / "mutations",
) -> None:
    chosen = [k for k in tables.kernels() if not kernel or k.name.startswith(tuple(kernel))]
    due = {k: [m for m in k.mutations if every or tables.stale(k, m)] for k in chosen}
    survived: list[str] = []
    if any(due.values()):
        workshop = Workshop(work.resolve())
        workshop.prepare(builds=any(due[k] for k in chosen if k.language != "triton"))
        for k, mutations in due.items():
            survived += _try(workshop, k, mutations) if mutations else []
    tables.save(tables.results())
    readme.write()
    if survived:
        raise SystemExit("\n".join(["Not caught:", *survived]))


def _try(workshop: Workshop, kernel: tables.Kernel, mutations: list[tables.Mutation]) -> list[str]:
    """Try these mutations of a kernel; those that nothing caught or that do not compile."""
    print(f"{kernel.name}: {len(mutations)} mutations", flush=True)
    survived = []
    passing: set[str] = set()  # without a mutation, of what failed with one
    for mutation in mutations:
        begun = time.monotonic()
        try:
            with workshop.broken(mutation):
                failed = ((step, workshop.failing(kernel, step)) for step in kernel.steps)
                step, caught_by = next((found for found in failed if found[1]), ("", None))
        except Invalid as error:
            survived.append(f"{kernel.name}: {mutation.name}: does not compile\n{str(error)[-2000:]}")
            print(f"  {mutation.name}: does not compile", flush=True)
            continue
        seconds = time.monotonic() - begun
        if step:
            test = shlex.quote(f"tests/{caught_by}") if "::" in (caught_by or "") else step
            if test not in passing and (failing := workshop.failing(kernel, test)) is not None:
                raise SystemExit(f"{kernel.name}: {failing} fails without a mutation")
            passing.add(test)
        tables.record(kernel, mutation, caught_by, seconds)
        if caught_by is None:
            survived.append(f"{kernel.name}: {mutation.name}")
        print(f"  {mutation.name}: {caught_by or 'SURVIVED'} ({seconds:.1f} s)", flush=True)
    return survived


if __name__ == "__main__":  # not in the processes that tests are forked from
    typer.run(main)
