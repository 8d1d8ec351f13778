"""Time the ops of `petl_kernels.testing.CASES`: `python benchmarks/run.py --csv out.csv`.

Correctness comes first: where an implementation fails the rule of the tests on a shape that would be timed, nothing is
timed and the exit code is 1. `--suite gpu` is the whole programme of a GPU (benchmarks/gpu).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from libraries import astray, baselines
from options import DTYPES, own_inductor_cache, some_of
from provenance import ISA_VARIABLES, provenance
from report import Measurement, print_group, print_origin, save
from rich.console import Console
from rich.progress import track
from timing import call_of, ceilings, interleave, repeated
from torch._functorch import config as functorch

from petl_kernels.profiling import saved_bytes
from petl_kernels.testing import CASES, Case, arguments, check

HOST_CALLS = 100
MODES = ("forward", "backward", "full", "host")
Provider = tuple[Callable[..., Any], dict[str, Any]]
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main(
    op: Annotated[str | None, typer.Option(help="Ops, comma-separated; all of them otherwise.")] = None,
    impl: Annotated[
        str | None, typer.Option(help="Implementations, comma-separated; all that run here otherwise.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Some of forward (no grad), backward, full (both), host.")
    ] = "forward,full,host",
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(DTYPES)}.")] = "float32,bfloat16",
    shape: Annotated[list[str] | None, typer.Option(help="As 4096x768x64; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per shape, dtype and mode.")] = 3.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    compile: Annotated[bool, typer.Option(help="Time torch.compile of the reference too.")] = True,
    isa: Annotated[str | None, typer.Option(help=f"Emulate a machine with {' or '.join(ISA_VARIABLES)} only.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="gpu: all ops, and training steps, on one GPU in --minutes.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="What the suite may take.")] = 7.5,
    rehearse: Annotated[
        bool, typer.Option(help="Run the suite in tiny sizes on the CPU; its figures say nothing.")
    ] = False,
) -> None:
    """Check, then time eager, torch.compile and every implementation in interleaved rounds."""
    if isa is not None:
        _emulate(isa)
    if suite is not None and suite != "gpu":
        raise typer.BadParameter(f"--suite must be gpu, got {suite!r}")
    own_inductor_cache()
    functorch.donated_buffer = False  # or a compiled backward could not be timed by itself
    torch.set_num_threads(threads or torch.get_num_threads())
    if suite == "gpu":
        from gpu.run import run_suite

        raise typer.Exit(run_suite(console, minutes, op, impl, compile, rehearse, csv))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    modes = some_of("--mode", mode, MODES)
    dtypes = some_of("--dtype", dtype, tuple(DTYPES))
    known = tuple(case.name for case in CASES)
    wanted = known if op is None else some_of("--op", op, known)
    cases = [case for case in CASES if case.name in wanted]
    origin = provenance(device)
    print_origin(console, origin)

    plan = [(case, samples(case, shape), implementations(case, impl, device, dtypes)) for case in cases]
    wrong = [f for case, shapes, names in plan for f in failures(case, shapes, names, dtypes, device)]
    if wrong:
        console.print("Wrong results, so nothing is timed:", *wrong, sep="\n  ", markup=False)
        raise typer.Exit(1)
    measurements: list[Measurement] = []
    for case, shapes, names in plan:
        for each in dtypes:
            found = list(measure(case, shapes, providers(case, names, compile), modes, each, device, seconds, repeats))
            measurements += found
            for one in modes:
                if group := [m for m in found if m.mode == one]:
                    print_group(console, group, baselines=["eager", "compile", *baselines(case)])
    save(console, csv, measurements, origin)


def _emulate(isa: str) -> None:
    """Start this program again under the variables of an instruction set, unless they are in force."""
    if isa not in ISA_VARIABLES:
        raise typer.BadParameter(f"--isa must be one of {list(ISA_VARIABLES)}, got {isa!r}")
    if any(os.environ.get(name) != value for name, value in ISA_VARIABLES[isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA_VARIABLES[isa]})


def samples(case: Case, shapes: list[str] | None) -> list[dict[str, Any]]:
    """The case's benchmark calls, or one for each shape of the command line."""
    if shapes is None:
        return [dict(sample) for sample in case.bench]
    keys = [key for key, value in case.bench[0].items() if type(value) is int]
    found = []
    for text in shapes:
        sizes = text.split("x")
        if len(sizes) != len(keys) or not all(size.isdigit() for size in sizes):
            raise typer.BadParameter(f"--shape must be {'x'.join(keys)} for {case.name}, got {text!r}")
        found.append({"id": text, **dict(zip(keys, map(int, sizes)))})
    return found


def implementations(case: Case, impl: str | None, device: str, dtypes: list[str]) -> list[str]:
    """The kernels to time: those asked for, which must run here, or those that do, naming the others."""
    wanted = impl.split(",") if impl else case.op.impls
    kernels = []
    for name in wanted:
        if name not in case.op.impls:
            raise typer.BadParameter(f"--impl must be some of {', '.join(case.op.impls)}, got {name!r}")
        reasons = [_unsupported(case, name, device, dtype) for dtype in dtypes]
        reason = next(filter(None, reasons), None)
        if reason is None and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            reason = "TRITON_INTERPRET=1 is set, and the time of an interpreter means nothing"
        if reason is not None:
            console.print(f"{case.name}: {name} is not timed: {reason}", markup=False)
            if impl:
                raise typer.Exit(1)
        elif name != "reference":
            kernels.append(name)
    return kernels


def _unsupported(case: Case, impl: str, device: str, dtype: str) -> str | None:
    call = case.op.prepare(**arguments(case.inputs(case.host, DTYPES[dtype], device=device)))
    return case.op.unsupported(impl, *call)


def failures(case: Case, shapes: list[dict[str, Any]], names: list[str], dtypes: list[str], device: str) -> list[str]:
    """What is wrong with the results of kernels and baselines on the very calls that would be timed."""
    found = []
    pairs = [(sample, dtype) for dtype in dtypes for sample in (case.host, *shapes)]
    for sample, dtype in track(pairs, f"checking {case.name}", console=console, transient=True):
        inputs = case.inputs(sample, DTYPES[dtype], device=device)
        for name, fn in baselines(case).items():
            found += [f"{case.name} {sample['id']} {dtype} {name}: {f}" for f in astray(case, inputs, fn)]
        found += [f"{case.name} {sample['id']} {dtype} {n}: {f}" for n in names for f in check(case, inputs, impl=n)]
    return found


def providers(case: Case, names: list[str], compile: bool) -> dict[str, Provider]:
    """Who is timed: eager PyTorch, its compilation, what others do, our kernels."""
    found: dict[str, Provider] = {"eager": (case.fn, {"impl": "reference"})}
    if compile:
        found["compile"] = (torch.compile(case.fn, fullgraph=True, dynamic=False), {"impl": "reference"})
    found |= {name: (fn, {}) for name, fn in baselines(case).items()}
    return found | {name: (case.fn, {"impl": name}) for name in names}


def measure(
    case: Case,
    shapes: list[dict[str, Any]],
    who: dict[str, Provider],
    modes: list[str],
    dtype: str,
    device: str,
    seconds: float,
    repeats: int | None,
) -> Iterator[Measurement]:
    """Time every provider on every shape in every mode, in one dtype."""
    limits = ceilings(DTYPES[dtype], device)
    said = f"ceilings of {dtype}: {limits.flops / 1e9:.0f} GFLOP/s (matmul), {limits.bytes / 1e9:.0f} GB/s (copy)"
    console.print(said, markup=False)
    modes = [mode for mode in modes if case.differentiable or mode in ("forward", "host")]
    todo = [(mode, sample) for mode in modes for sample in ([case.host] if mode == "host" else shapes)]
    everything = "full" if case.differentiable else "forward"
    for mode, sample in track(todo, f"timing {case.name} {dtype}", console=console, transient=True):
        torch._dynamo.reset()  # each shape is compiled for itself
        # Inputs of their own for each: some write to a weight, which would spoil the others' backward.
        inputs = {name: case.inputs(sample, DTYPES[dtype], device=device) for name in who}
        host = mode == "host"
        calls = {n: call_of(fn, inputs[n], everything if host else mode, options) for n, (fn, options) in who.items()}
        if host:
            calls = {name: repeated(call, HOST_CALLS) for name, call in calls.items()}
        times = interleave(calls, device, seconds, repeats)
        flops, elements = case.cost(sample, everything if host else mode)
        moved = elements * DTYPES[dtype].itemsize
        for name, (fn, options) in who.items():
            if host:
                yield Measurement(case.name, name, mode, sample, dtype, times[name].over(HOST_CALLS), flops, moved)
                continue
            saved = saved_bytes(lambda: fn(**arguments(inputs[name]), **options)) if mode == "full" else None  # noqa: B023
            yield Measurement(case.name, name, mode, sample, dtype, times[name], flops, moved, limits, saved)


if __name__ == "__main__":
    typer.run(main)
