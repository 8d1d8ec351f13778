"""`petl-kernels env`: what is built, what is not and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from petl_kernels.env import report


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False) -> None:
    """Print versions, hardware, what is built and what is not and why, and which implementation runs each op.

    Exit codes: 0 printed; 2 an option is wrong.
    """
    facts = report()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_installation(facts), *_ops(facts["ops"]), *_surroundings(facts)]:
        table.add_row(name, value)
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 120)  # reasons are long, and where there is no terminal it would be 80
    console.print(table)


def _installation(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, built = facts["cpu"], facts["built"]
    rows = [(name, value or "not installed") for name, value in facts["versions"].items()]
    rows.append(("CPU", f"{cpu['model']} ({cpu['machine']}), {cpu['threads']} threads, torch uses {cpu['torch_isa']}"))
    if built["cpu"]["built"]:
        names = {key: ", ".join(built["cpu"][key]) for key in ("built_isas", "isas")}
        said = f"built for {names['built_isas']}; this CPU runs {names['isas']}; active {built['cpu']['isa']}"
    else:
        said = f"not built: {built['cpu']['reason']}"
    rows.append(("C++ kernels", said))
    cuda = built["cuda"]
    rows.append(("CUDA kernels", f"built for {cuda['archs']}" if cuda["built"] else f"not built: {cuda['reason']}"))
    devices = facts["cuda"]["devices"]
    rows.append(("CUDA devices", ", ".join(devices) if devices else f"none: {facts['cuda']['reason']}"))
    return rows


def _ops(ops: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for op, places in ops.items():
        for place, said in places.items():
            lines = [said["error"] if said["chosen"] is None else f"runs on {said['chosen']}: {said['why']}"]
            lines += [f"not {name}: {reason}" for name, reason in said["others"].items()]
            rows.append((f"{op} {said['call']}, {place}", "\n".join(lines)))
    return rows


def _surroundings(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, value if value is not None else "unset") for name, value in facts["environment"].items()]
    return rows + [(f"swaps into {name}", value or "not installed") for name, value in facts["swappable"].items()]
