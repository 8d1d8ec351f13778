"""`make fuzz`: random calls of every op and steps of the optimizers until time is up, each held to float64.

    python tests/fuzz.py --minutes 5 --op layer_norm --op adamw --impl triton

A failure is shrunk and printed as a line that repeats it; the exit status is then 1. Hypothesis searches for calls
whose error is a large part of what is allowed, and keeps in .hypothesis/fuzz, from run to run, what failed and what
came closest: the next run begins with them. What was a bug belongs into `FOUND` of tests/test_fuzz.py.
"""

from __future__ import annotations

import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
if "triton" in sys.argv:
    import conftest  # the interpreter, before Triton is imported

    conftest.pytest_configure()

import torch  # noqa: E402
import typer  # noqa: E402
from fuzzing import BY_NAME, Call, Step, strategy  # noqa: E402
from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target  # noqa: E402
from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: E402
from optimizers import OPTIMIZERS  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

CORPUS = ROOT / ".hypothesis" / "fuzz"
NAMES = (*BY_NAME, *OPTIMIZERS)
ROUND = 40  # calls, between two looks at the clock

app = typer.Typer(add_completion=False)
console = Console(soft_wrap=True)


def repeat(drawn: Call | Step) -> str:
    """A command that makes the same call again."""
    return f"PYTHONPATH=tests python -c {shlex.quote(f'from fuzzing import *; print({drawn!r}.failures())')}"


@dataclass
class Target:
    """One op with one implementation: how often it was called, and what broke."""

    name: str
    impl: str
    calls: int = 0
    refused: int = 0
    closest: float = 0.0
    broken: Call | Step | None = None
    why: str = ""

    def judge(self, drawn: Call | Step) -> None:
        """Judge one call. The op may refuse it in its own words, as it does what has no meaning."""
        self.calls += 1
        shares: list[float] = []
        try:
            found = drawn.failures(shares.append)
        except Exception as error:
            if not isinstance(error, (ValueError, TypeError)) or not str(error).startswith(f"{self.name}: "):
                self.fail(drawn)
                raise
            self.refused += 1
            return
        if found:
            self.fail(drawn)
            raise AssertionError("; ".join(found))
        for share in shares:
            target(share)
            self.closest = max(self.closest, share)

    def fail(self, drawn: Call | Step) -> None:
        """Keep a call that failed. The last one is the shrunk one, which Hypothesis runs again at the end."""
        if self.broken is None:  # now, since shrinking takes its time
            console.print(f"found, to be shrunk:\n{repeat(drawn)}", markup=False, highlight=False)
        self.broken = drawn

    def round(self) -> None:
        """Some calls; the corpus comes first."""
        options = settings(
            max_examples=ROUND,
            database=DirectoryBasedExampleDatabase(CORPUS / self.name / self.impl),
            phases=[Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
            deadline=None,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
        )
        try:
            options(given(strategy(self.name, self.impl))(self.judge))()
        except Exception as error:
            if self.broken is None:  # a mistake in the strategies
                raise
            self.why = f"{type(error).__name__}: {error}"


@app.command()
def fuzz(
    minutes: Annotated[float, typer.Option(help="When to stop; a round that has begun is finished.")] = 10.0,
    op: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NAMES)}; all without.")] = None,
    impl: Annotated[list[str] | None, typer.Option(help="cpp, triton (interpreted) or cuda; cpp without.")] = None,
) -> None:
    """Random calls of every op until time is up."""
    unknown = [name for name in op or () if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"--op must be of {', '.join(NAMES)}, got {unknown[0]}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN, so that unwritten elements show
    targets = [Target(name, which) for which in impl or ["cpp"] for name in op or NAMES]
    until = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        while time.monotonic() < until and (whole := [t for t in targets if t.broken is None]):
            for each in random.sample(whole, len(whole)):  # or a short run would never come to the last
                if time.monotonic() < until:
                    progress.update(task, description=f"{sum(t.calls for t in targets)} calls, now {each.name}")
                    each.round()
    report(targets)
    raise typer.Exit(any(t.broken is not None for t in targets))


def report(targets: list[Target]) -> None:
    """A line for each op, then what broke."""
    table = Table("op", "implementation", "calls", "refused", "largest error / allowed", "")
    for t in targets:
        table.add_row(t.name, t.impl, f"{t.calls}", f"{t.refused}", f"{t.closest:.2f}", "BROKEN" if t.broken else "")
    console.print(table)
    for t in targets:
        if t.broken is not None:
            console.print(f"\n{t.name}, {t.impl}: {t.why}\n{repeat(t.broken)}", markup=False, highlight=False)


if __name__ == "__main__":
    app()
