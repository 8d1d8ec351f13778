"""`petl-kernels bench`: how fast the ops are here, beside eager PyTorch and its compilation."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from petl_kernels.benchmarking import cases, plots, timing
from petl_kernels.benchmarking.cases import MODES, Job, NotHere, Plan, modes_of
from petl_kernels.benchmarking.compare import Comparison, compare
from petl_kernels.benchmarking.options import DTYPES, emulate, keep_compiled_buffers, own_inductor_cache, some_of
from petl_kernels.benchmarking.provenance import ISA_VARIABLES, provenance
from petl_kernels.benchmarking.record import Record, load, record
from petl_kernels.benchmarking.report import Measurement, print_group, print_origin, write_csv
from petl_kernels.benchmarking.timing import Ceilings
from petl_kernels.cli._common import IMPOSSIBLE, SLOWER, UNJUDGED, USAGE, WRONG, complain, progress, stop
from petl_kernels.testing import CASES

FULL: dict[str, Any] = {"mode": "forward,full,host", "dtype": "float32,bfloat16", "compile": True, "seconds": 3.0}
QUICK_SECONDS, PLOT_SECONDS = 12, 3  # for checks and timings; PyTorch takes 3 more to load, plots take 3 to draw
QUICK: dict[str, Any] = {"mode": "full", "dtype": "float32", "compile": False, "seconds": 0.25}
QUICK_PLOT: dict[str, Any] = {"seconds": 0.05}  # of each of the five calls of an op


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops; all of them otherwise.", metavar="OP")] = None,
    impl: Annotated[
        str | None, typer.Option(help="Implementations, comma-separated; all that run here otherwise.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 20 seconds: of each op the smallest shape, in float32, full mode.")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(help=f"Some of forward (no grad), backward, full (both), host. Default: {FULL['mode']}."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Some of {', '.join(DTYPES)}. Default: {FULL['dtype']}.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="As 4096x768x64; may be repeated.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Time torch.compile of the reference too.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    isa: Annotated[str | None, typer.Option(help=f"Emulate a machine with {' or '.join(ISA_VARIABLES)} only.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help=f"Of timed rounds per shape, dtype and mode. Default: {FULL['seconds']}."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Exact number of rounds instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.csv and plots.")] = Path("out/bench"),
    csv: Annotated[Path | None, typer.Option(help="The CSV goes here instead.")] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw speed-up, roofline and cost against N, for which more N are timed.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--compare", exists=True, dir_okay=False, help="A bench.json of an earlier run.")
    ] = None,
    fail_above: Annotated[
        str | None, typer.Option(help="With --compare: exit with 4 where a median rose by more than this, as 5%.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check the kernels' results, then time them beside eager PyTorch and torch.compile in interleaved rounds.

    Medians, with the 20 % and 80 % quantiles; % ceiling is of the time that this machine's own matmul or copy, measured
    in the same run, would need. Writes into --out: bench.json (what --json prints and --compare reads), bench.csv (in
    the column order of Liger-Kernel) and, with --plot, pictures.

    Exit codes: 0 measured; 1 a kernel computes something else than eager, and nothing was timed; 2 an option is wrong;
    3 a device, a package or an implementation that was asked for is missing; 4 slower than --compare by more than
    --fail-above; 5 --fail-above has nothing to judge by (another machine, no row in common).
    """
    if isa is not None:
        emulate(isa)
    limit = _percent(fail_above)
    if limit is not None and against is None:
        _stop(USAGE, "--fail-above needs --compare")
    if plot and (reason := plots.missing()):
        _stop(IMPOSSIBLE, reason)
    try:
        old = None if against is None else load(against)
    except ValueError as error:
        _stop(USAGE, str(error))
    chosen = {k: v for k, v in dict(mode=mode, dtype=dtype, compile=compile, seconds=seconds).items() if v is not None}
    settings = {**(QUICK if quick else FULL), **(QUICK_PLOT if quick and plot else {}), **chosen}
    known = [case.name for case in CASES]
    wanted = known if not ops else some_of("OP", ops, known)
    plan = Plan(
        cases=[case for case in CASES if case.name in wanted],
        impls=impl.split(",") if impl else None,
        modes=some_of("--mode", settings["mode"], MODES),
        dtypes=some_of("--dtype", settings["dtype"], DTYPES),
        device=_device(device),
        shapes=shape,
        quick=quick,
        sweep=plot,
        compile=settings["compile"],
        seconds=settings["seconds"],
        repeats=repeats,
        until=time.monotonic() + QUICK_SECONDS - PLOT_SECONDS * plot if quick else inf,
    )
    torch.set_num_threads(threads or torch.get_num_threads())
    console = Console(highlight=False, quiet=as_json)
    console.width = max(console.width, 132)  # a row each, also where there is no terminal
    found, measurements = _run(plan, console)
    if old is not None and not found["wrong"]:
        comparison = compare(old, found)
        found["comparison"] = comparison.as_json(limit)
        _print_comparison(console, comparison, limit)
    written = [] if found["wrong"] else _write(found, measurements, out, csv, plot)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    for path in written:
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    raise typer.Exit(_verdict(found, limit))


def _run(plan: Plan, console: Console) -> tuple[Record, list[Measurement]]:
    """Check, time and print; the record, and the measurements of which it was made."""
    left_out = []
    if plan.compile:
        own_inductor_cache()
        keep_compiled_buffers()
        if reason := cases.cannot_compile(plan.device):
            plan = replace(plan, compile=False)
            left_out.append(f"torch.compile: {reason}")
    origin = provenance(plan.device)
    print_origin(console, origin)
    try:
        jobs, unsupported = cases.jobs(plan)
    except NotHere as error:
        _stop(IMPOSSIBLE, str(error))
    left_out += [*_quick_leaves(plan, jobs), *_grouped(unsupported, len(plan.cases))]
    limits: dict[str, Ceilings] = {}
    found: list[Measurement] = []
    with progress() as say:
        right, wrong = cases.checked(jobs, plan, say)
    if not wrong:
        limits = {dtype: timing.ceilings(DTYPES[dtype], plan.device) for dtype in plan.dtypes}
        _print_ceilings(console, limits)
    for job, dtype in product(() if wrong else right, plan.dtypes):
        if time.monotonic() > plan.until:
            break
        with progress() as say:  # gone before anything is printed
            group = list(cases.measure(job, plan, dtype, limits[dtype], say))
        found += group
        if not plan.quick:
            _print_groups(console, group, plan)
    if plan.quick:
        _print_groups(console, found, plan)
    if late := [] if wrong else _late(jobs, plan, found):
        left_out.append(f"for lack of time: {', '.join(late)}")
    for note in left_out:
        console.print(f"left out: {note}", markup=False, soft_wrap=True)
    settings = {key: getattr(plan, key) for key in ("impls", "modes", "dtypes", "device", "shapes", "quick", "compile")}
    settings |= {"seconds": plan.seconds, "repeats": plan.repeats}
    return record(found, origin, settings, limits, left_out, wrong), found


def _print_groups(console: Console, found: Sequence[Measurement], plan: Plan) -> None:
    """A table for each mode; of a quick run, which has few rows of each op, one for all but the host's times."""
    for names in (("forward", "backward", "full"), ("host",)) if plan.quick else ((mode,) for mode in MODES):
        if group := [m for m in found if m.mode in names]:
            kernels = dict.fromkeys(m.kernel for m in group)
            others = [name for case in plan.cases if case.name in kernels for name in plan.baselines(case)]
            print_group(console, group, ["eager", "compile", *others])


def _print_ceilings(console: Console, limits: Mapping[str, Ceilings]) -> None:
    for dtype, c in limits.items():
        said = f"{c.flops / 1e9:.0f} GFLOP/s (matmul), {c.bytes / 1e9:.0f} GB/s (copy)"
        console.print(f"ceilings of {dtype}: {said}", markup=False)


def _late(jobs: Sequence[Job], plan: Plan, found: Sequence[Measurement]) -> list[str]:
    """The ops and dtypes that there was no time for."""
    there = {(m.kernel, m.dtype) for m in found}
    wanted = [(job.case.name, dtype) for job, dtype in product(jobs, plan.dtypes) if modes_of(job.case, plan.modes)]
    return [" ".join(pair) for pair in wanted if pair not in there]


def _quick_leaves(plan: Plan, jobs: Sequence[Job]) -> Iterator[str]:
    """What a quick run does not measure and a full one would."""
    if not plan.quick:
        return
    others = 0 if plan.shapes else sum(len(job.case.bench) - 1 for job in jobs)
    said = [f"{others} other shapes"] if others else []
    said += [f"{name} mode" for name in FULL["mode"].split(",") if name not in plan.modes]
    said += [name for name in FULL["dtype"].split(",") if name not in plan.dtypes]
    said += [] if plan.compile else ["torch.compile"]
    yield f"by --quick: {', '.join([*said, 'the baselines of single ops'])}"


def _grouped(unsupported: Mapping[str, Sequence[str]], count: int) -> Iterator[str]:
    """The implementations that are not timed, each reason once."""
    for said, names in unsupported.items():
        yield said if len(names) == count else f"{said} ({', '.join(names)})"


def _print_comparison(console: Console, comparison: Comparison, limit: float | None) -> None:
    for remark in comparison.remarks:
        console.print(f"comparison: {remark}", markup=False)
    changes, shown = comparison.changes, 0.0 if limit is None else limit
    slower, faster = comparison.slower(shown), [c for c in changes if c.percent < -shown]
    if slower:
        table = Table(title=f"slower by more than {shown:g} %", title_justify="left")
        for heading in ("op", "shape", "dtype", "mode", "impl", "then, ms", "now, ms", "change"):
            table.add_column(heading, justify="right" if "ms" in heading or heading == "change" else "left")
        for c in slower:
            figures = (f"{c.old_ms:.4g}", f"{c.new_ms:.4g}", f"{c.percent:+.1f} %")
            table.add_row(c.op, c.shape, c.dtype, c.mode, c.impl, *figures)
        console.print(table)
    said = f"{len(changes)} rows of kernels compared: {len(slower)} slower, {len(faster)} faster by over {shown:g} %"
    drift = "" if comparison.drift is None else f"; PyTorch itself takes {comparison.drift:.2f} times what it took"
    console.print(said + drift, markup=False)


def _write(
    found: Record, measurements: Sequence[Measurement], out: Path | None, csv: Path | None, plot: bool
) -> list[Path]:
    """The files that were asked for."""
    written = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        written.append(out / "bench.json")
        written[-1].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        csv = csv or out / "bench.csv"
    if csv is not None:
        write_csv(csv, measurements, found["provenance"])
        written.append(csv)
    return written + (plots.draw(found, out) if plot and out is not None else [])


def _verdict(found: Record, limit: float | None) -> int:
    """The exit code, with its reason on stderr where it is not 0."""
    if found["wrong"]:
        complain("bench", "\n  ".join(["wrong results, so nothing is timed:", *found["wrong"]]))
        return WRONG
    if limit is None:
        return 0
    comparison = found["comparison"]
    if not comparison["changes"]:
        complain("bench", "--fail-above has nothing to judge by: no row of a kernel could be compared")
        return UNJUDGED
    if comparison["slower"]:
        complain("bench", f"{len(comparison['slower'])} medians rose by more than {limit:g} %")
    return SLOWER if comparison["slower"] else 0


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?%?", text):
        _stop(USAGE, f"--fail-above has to be a percentage like 5%, got {text!r}")
    return float(text.rstrip("%"))


def _device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        _stop(USAGE, f"--device has to be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        _stop(IMPOSSIBLE, f"--device cuda: torch {torch.__version__} finds no CUDA device; `env` says more")
    return device


def _stop(code: int, message: str) -> NoReturn:
    stop("bench", code, message)
