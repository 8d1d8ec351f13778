"""`petl-kernels profile`: where a training step goes, and what the kernels change."""

from __future__ import annotations

import ast
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from petl_kernels.benchmarking.options import DTYPES
from petl_kernels.cli._common import IMPOSSIBLE, USAGE, WRONG, complain, progress, stop
from petl_kernels.ops.bottleneck_adapter import OP
from petl_kernels.profiling import plots
from petl_kernels.profiling.html import facts, page
from petl_kernels.profiling.run import Plan
from petl_kernels.profiling.run import profile as run
from petl_kernels.profiling.tables import Rows, fuse_table, saved_table, step_table, summary_table
from petl_kernels.profiling.target import BUILT_IN, Options, TargetError, find_target
from petl_kernels.profiling.variants import DEFAULT, VARIANTS

_stop = partial(stop, "profile")


def profile(
    target: Annotated[
        str,
        typer.Argument(
            help=f"{' or '.join(BUILT_IN)}; package.module:function; script.py[:function] (default: build). The "
            "function returns (model, batch or iterable of batches, loss), where loss(model, batch) is a scalar. Where "
            "it takes an argument `adapters`, build(adapters=False) is the frozen model."
        ),
    ],
    variants: Annotated[str, typer.Option(help=f"Some of {','.join(VARIANTS)}.")] = ",".join(DEFAULT),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each variant.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="3 steps, small built-in batches, nothing compiled.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(DTYPES)}; default: as built.")] = None,
    method: Annotated[str | None, typer.Option(help="Of the built-in models: see `methods`. Default: houlsby.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the method: bottleneck=48. Repeatable.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples, of the built-in models. Default: 8.")] = None,
    impl: Annotated[str | None, typer.Option(help="Of the fused variants; default: the fastest known.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Names or patterns of modules with adapters, if of no known kind.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report, plots, traces and figures.")] = Path("out/profile"),
    draw: Annotated[bool, typer.Option("--plots/--no-plots", help="Plots need matplotlib.")] = True,
    seed: Annotated[int, typer.Option(help="Set before every build.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Profile a training step: frozen, eager, compiled and fused, side by side.

    Writes into --out: report.html, profile.json, plots (PNG), a trace per variant for ui.perfetto.dev and, on a GPU, a
    snapshot of its memory. What computes other gradients than eager is reported, and not timed.

    Exit codes: 0 profiled (variants that cannot run here are listed with the reason); 1 a variant computes other
    gradients than eager; 2 the target or an option is wrong; 3 a device or a package is missing.
    """
    if draw and (reason := plots.missing()):
        _stop(IMPOSSIBLE, reason)
    chosen = _names(variants)
    if impl not in (None, "auto", *OP.impls):
        _stop(USAGE, f"--impl has to be one of auto, {', '.join(OP.impls)}, got {impl!r}")
    left = {}
    if quick:
        steps, batch = min(steps, 3), batch or (2 if target in BUILT_IN else None)
        if variants == ",".join(DEFAULT):
            chosen.remove("compiled")
            left["compiled"] = "--quick leaves it out; name it in --variants"
    options = Options(_device(device), _dtype(dtype), method, _settings(option or []), batch, seed)
    out.mkdir(parents=True, exist_ok=True)
    try:
        found = find_target(target, options)
        with progress() as say:
            record = run(found, Plan(chosen, steps, impl, adapters or (), out), say)
    except (TargetError, ValueError) as error:
        _stop(USAGE, str(error))
    record["variants"] |= {name: {"unavailable": reason} for name, reason in left.items()}
    (out / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
    pictures = plots.draw(record, out) if draw and plots.measured(record) else []
    (out / "report.html").write_text(page(record, pictures), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        _print(record, out)
    for line in record["wrong"]:
        complain("profile", line)
    raise typer.Exit(WRONG if record["wrong"] else 0)


def _print(record: dict[str, Any], out: Path) -> None:
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 110)  # a row each, also where there is no terminal
    console.print(f"A training step of {record['target']}", style="bold")
    console.print(facts(record))
    for name, variant in record["variants"].items():
        if "unavailable" in variant:
            console.print(f"{name} did not run: {variant['unavailable']}")
    tables = {"": summary_table, "where it goes": step_table, "saved activations, MiB": saved_table, "fuse": fuse_table}
    for title, rows in tables.items():
        _table(console, title, rows(record))
    console.print(f"\nReport: {out / 'report.html'}; all figures: {out / 'profile.json'}")


def _table(console: Console, title: str, rows: Rows) -> None:
    if len(rows) < 2:
        return
    head, *body = rows
    words = title == "fuse"
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for at, name in enumerate(head):
        table.add_column(name, justify="left" if at == 0 or words else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console.print()
    console.print(table)


def _names(variants: str) -> list[str]:
    names = [name.strip() for name in variants.split(",") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        _stop(USAGE, f"--variants: {', '.join(unknown)} is none of {', '.join(VARIANTS)}")
    if not names:
        _stop(USAGE, f"--variants names none of {', '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


def _device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        _stop(USAGE, f"--device has to be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        _stop(IMPOSSIBLE, f"--device {device}: torch {torch.__version__} finds no CUDA device; `env` says more")
    return device


def _dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        _stop(USAGE, f"--dtype has to be one of {', '.join(DTYPES)}, got {dtype!r}")
    return None if dtype is None else DTYPES[dtype]


def _settings(options: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for each in options:
        name, equals, value = each.partition("=")
        if not (equals and name.isidentifier()):
            _stop(USAGE, f"--option has to be name=value, got {each!r}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a word
    return settings
