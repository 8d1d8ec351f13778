"""The cases timed: which calls and kernels a plan asks for, whether they are right, how long they take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
import typer

from petl_kernels.benchmarking.libraries import Baselines, astray, baselines
from petl_kernels.benchmarking.options import DTYPES, some_of
from petl_kernels.benchmarking.report import Measurement
from petl_kernels.benchmarking.timing import Ceilings, call_of, interleave, repeated
from petl_kernels.ops._op import REFERENCE
from petl_kernels.profiling import saved_bytes
from petl_kernels.testing import Case, arguments, check

HOST_CALLS = 100
MODES = ("forward", "backward", "full", "host")
SWEEP = (64, 256, 1024, 4096)  # rows, for the plot of cost against them
Provider = tuple[Callable[..., Any], dict[str, Any]]
Say = Callable[[str, int, int], None]  # what is going on, how much of it is done, of how much


class NotHere(RuntimeError):
    """An implementation that was asked for cannot run here."""


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        cases: the ops.
        impls: names of implementations, which then have to run here; None takes all that do.
        modes: some of `MODES`.
        dtypes: names, as in `DTYPES`.
        device: "cpu" or "cuda".
        shapes: as 4096x768x64, instead of the cases' own calls.
        quick: of each op only the smallest call, and beside it only eager.
        sweep: calls that differ in the number of rows alone, too.
        compile: time torch.compile of the reference too.
        seconds: budget of the timed rounds of one call in one mode.
        repeats: exact number of rounds instead.
        until: of `time.monotonic`; no op is begun later, nor checked when half of the time is over.
    """

    cases: Sequence[Case]
    impls: Sequence[str] | None
    modes: Sequence[str]
    dtypes: Sequence[str]
    device: str
    shapes: Sequence[str] | None = None
    quick: bool = False
    sweep: bool = False
    compile: bool = True
    seconds: float = 3.0
    repeats: int | None = None
    until: float = inf

    def baselines(self, case: Case) -> Baselines:
        """Who is timed beside eager and its compilation."""
        return {} if self.quick else baselines(case)


@dataclass(frozen=True)
class Job:
    """An op, the calls to time and the kernels to time them with."""

    case: Case
    samples: Sequence[Mapping[str, Any]]
    kernels: Sequence[str]


def cannot_compile(device: str) -> str | None:
    """Why torch.compile does not work here (no compiler, say), or None."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler says, the others can be timed
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def jobs(plan: Plan) -> tuple[list[Job], dict[str, list[str]]]:
    """What there is to do, and the implementations that are not timed: "name: reason" -> ops.

    Raises:
        NotHere: an implementation that the plan names cannot run.
        typer.BadParameter: an implementation or a shape that an op does not have.
    """
    left_out: dict[str, list[str]] = {}
    found = []
    for case in plan.cases:
        kernels = []
        for name in case.op.impls if plan.impls is None else some_of("--impl", plan.impls, case.op.impls):
            reason = _unsupported(case, name, plan)
            if reason is None:
                kernels += [] if name == REFERENCE else [name]
            elif plan.impls is not None:
                raise NotHere(f"{case.name}: {name} is not timed: {reason}")
            else:
                left_out.setdefault(f"{name} is not timed: {reason}", []).append(case.name)
        found.append(Job(case, samples(case, plan), kernels))
    return found, left_out


def samples(case: Case, plan: Plan) -> list[Mapping[str, Any]]:
    """The case's benchmark calls, or one for each shape that was asked for."""
    keys = [key for key, value in case.bench[0].items() if type(value) is int]
    if plan.shapes is None:
        found = [min(case.bench, key=lambda sample: prod(sample[key] for key in keys))] if plan.quick else case.bench
        return [*found, *(sweep(case, {sample["id"] for sample in found}) if plan.sweep else ())]
    asked: list[Mapping[str, Any]] = []
    for text in plan.shapes:
        sizes = text.split("x")
        if len(sizes) != len(keys) or not all(size.isdigit() for size in sizes):
            raise typer.BadParameter(f"--shape must be {'x'.join(keys)} for {case.name}, got {text!r}")
        asked.append({"id": text, **dict(zip(keys, map(int, sizes)))})
    return asked


def sweep(case: Case, known: set[str]) -> Iterator[Mapping[str, Any]]:
    """The case's first benchmark call with other numbers of rows, which are those of all its samples."""
    for rows in SWEEP:
        sample = {**case.bench[0], "n": max(1, rows // prod(case.bench[0].get("tokens", ())))}
        sample["id"] = "x".join(str(value) for value in sample.values() if type(value) is int)
        if sample["id"] not in known:
            yield sample


def _unsupported(case: Case, impl: str, plan: Plan) -> str | None:
    """Why an implementation cannot run the case's smallest call in every dtype, or None."""
    for dtype in plan.dtypes:
        call = case.op.prepare(**arguments(case.inputs(case.host, DTYPES[dtype], device=plan.device)))
        if (reason := case.op.unsupported(impl, *call)) is not None:
            return reason
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and the time of an interpreter means nothing"
    return None


def failures(job: Job, plan: Plan, say: Say) -> list[str]:
    """What is wrong with the results of kernels and baselines on the very calls that would be timed."""
    case, found = job.case, []
    calls = [*job.samples, *([case.host] if "host" in plan.modes else ())]
    pairs = [(sample, dtype) for dtype in plan.dtypes for sample in calls]
    for done, (sample, dtype) in enumerate(pairs):
        say(f"checking {case.name}", done, len(pairs))
        inputs = case.inputs(sample, DTYPES[dtype], device=plan.device)
        wrong = {name: astray(case, inputs, fn) for name, fn in plan.baselines(case).items()}
        wrong |= {name: check(case, inputs, impl=name) for name in job.kernels}
        found += [f"{case.name} {sample['id']} {dtype} {name}: {f}" for name, said in wrong.items() for f in said]
    return found


def checked(jobs: Sequence[Job], plan: Plan, say: Say) -> tuple[list[Job], list[str]]:
    """The jobs that were checked in time, and what is wrong with them."""
    start = time.monotonic()
    wrong: list[str] = []
    for at, job in enumerate(jobs):
        if time.monotonic() > (start + plan.until) / 2:
            return list(jobs[:at]), wrong
        wrong += failures(job, plan, say)
    return list(jobs), wrong


def providers(job: Job, plan: Plan) -> dict[str, Provider]:
    """Who is timed: eager PyTorch, its compilation, what others do, our kernels."""
    fn = job.case.fn
    found: dict[str, Provider] = {"eager": (fn, {"impl": REFERENCE})}
    if plan.compile:
        found["compile"] = (torch.compile(fn, fullgraph=True, dynamic=False), {"impl": REFERENCE})
    found |= {name: (baseline, {}) for name, baseline in plan.baselines(job.case).items()}
    return found | {name: (fn, {"impl": name}) for name in job.kernels}


def modes_of(case: Case, modes: Sequence[str]) -> list[str]:
    """Those that an op has: of one without a backward, the forward is all there is."""
    if case.differentiable:
        return list(modes)
    return list(dict.fromkeys("forward" if mode == "full" else mode for mode in modes if mode != "backward"))


def measure(job: Job, plan: Plan, dtype: str, limits: Ceilings, say: Say) -> Iterator[Measurement]:
    """Time every provider on every call in every mode, in one dtype."""
    case, kind = job.case, DTYPES[dtype]
    who = providers(job, plan)
    todo = [(m, s) for m in modes_of(case, plan.modes) for s in ([case.host] if m == "host" else job.samples)]
    everything = "full" if case.differentiable else "forward"
    for done, (mode, sample) in enumerate(todo):
        say(f"timing {case.name} {dtype}", done, len(todo))
        if plan.compile:
            torch._dynamo.reset()  # each shape is compiled for itself
        # Inputs of their own for each: some write to a weight, which would spoil the others' backward.
        inputs = {name: case.inputs(sample, kind, device=plan.device) for name in who}
        host = mode == "host"
        calls = {n: call_of(fn, inputs[n], everything if host else mode, options) for n, (fn, options) in who.items()}
        if host:
            calls = {name: repeated(call, HOST_CALLS) for name, call in calls.items()}
        times = interleave(calls, plan.device, plan.seconds, plan.repeats)
        flops, elements = case.cost(sample, everything if host else mode)
        moved = elements * kind.itemsize
        for name, (fn, options) in who.items():
            if host:
                yield Measurement(case.name, name, mode, sample, dtype, times[name].over(HOST_CALLS), flops, moved)
                continue
            saved = saved_bytes(lambda: fn(**arguments(inputs[name]), **options)) if mode == "full" else None  # noqa: B023
            yield Measurement(case.name, name, mode, sample, dtype, times[name], flops, moved, limits, saved)
