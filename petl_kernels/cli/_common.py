"""What the commands share: their exit codes, how they stop, their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WRONG, USAGE, IMPOSSIBLE, SLOWER, UNJUDGED = 1, 2, 3, 4, 5


def complain(program: str, message: str) -> None:
    """Say what is wrong on stderr, in the command's name."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{program}: {message}", style="red")


def stop(program: str, code: int, message: str) -> NoReturn:
    """End with an exit code and the reason."""
    complain(program, message)
    raise typer.Exit(code)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function `(what, done, of)` that draws a bar on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=1)

        def say(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield say
