"""`petl-kernels methods`: the table of the unified view."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from petl_kernels.methods import METHODS, Method

COLUMNS = ("method", "form of dh", "insertion", "where", "composition", "parameters of a block", "attach", "source")


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as the README has it.")] = False,
) -> None:
    """List the methods by their four design dimensions, their size and where they go.

    Exit codes: 0 printed; 2 an option is wrong.
    """
    if as_json:
        typer.echo(json.dumps({name: _facts(method) for name, method in METHODS.items()}, indent=2))
    elif markdown:
        typer.echo(as_markdown())
    else:
        console = Console(markup=False, highlight=False)
        console.width = max(console.width, 150)  # a row each, also where there is no terminal
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for method in METHODS.values():
            table.add_row(*_row(method))
        console.print(table)


def as_markdown() -> str:
    """The table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(method) for method in METHODS.values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(method: Method) -> tuple[str, ...]:
    dimensions = (method.form, method.insertion, method.where, method.composition)
    size = " + ".join(([] if method.parameters == "0" else [method.parameters]) + (["norms"] if method.norms else []))
    return (method.name, *dimensions, size, "yes" if method.place else f"nn.{method.module}", method.source)


def _facts(method: Method) -> dict[str, Any]:
    return {**asdict(method), "place": method.place is not None}
