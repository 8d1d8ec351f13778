"""The suite from its options to its files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from gpu import steps
from gpu.device import Cuda, Device, Rehearsal
from gpu.plan import REHEARSED, Budget, Grid, units
from gpu.report import plot
from gpu.suite import EXPECTED, Suite
from petl_kernels.benchmarking.options import some_of
from petl_kernels.benchmarking.provenance import provenance
from petl_kernels.benchmarking.report import print_origin, save
from petl_kernels.testing import CASES
from petl_kernels.testing.models import BERT, Encoder, Size, ViT

RESULTS = Path(__file__).parents[1] / "results"
TINY = Size(width=16, layers=2, heads=2, tokens=5, vocabulary=30, image=8, patch=4)


def tiny_bert() -> Encoder:
    return BERT(TINY)


def tiny_vit() -> Encoder:
    return ViT(replace(TINY, pre_norm=True))


def run_suite(
    console: Console, minutes: float, op: str | None, impl: str | None, compile: bool, rehearse: bool, csv: Path | None
) -> int:
    """Check, time, write `<gpu>.csv` and its plots (beside `csv` where it is given); the exit code."""
    if not rehearse and not torch.cuda.is_available():
        console.print("--suite gpu needs a CUDA device; --rehearse runs it on the CPU in tiny sizes.", markup=False)
        return 1
    device: Device = Rehearsal() if rehearse else Cuda()
    known = tuple(case.name for case in CASES)
    wanted = known if op is None else some_of("--op", op, known)
    kernels = some_of("--impl", impl, dict.fromkeys(n for case in CASES for n in case.op.impls)) if impl else None
    origin = provenance(device.kind) | ({"machine": device.name} if rehearse else {})
    print_origin(console, origin)
    plan = units([case for case in CASES if case.name in wanted], REHEARSED if rehearse else Grid())
    with device.stream():
        budget = Budget(60 * minutes, expected={} if rehearse else EXPECTED)
        suite = Suite(device, budget, console, kernels, compile)
        seen, wrong = suite.check(plan)
        if not wrong:
            suite.time(seen)
            models = {"bert": tiny_bert, "vit": tiny_vit} if rehearse else steps.MODELS
            wrong += steps.measure(suite, models, (2,) if rehearse else steps.BATCHES) if op is None else []
    for note in suite.notes:
        console.print(f"left out: {note}", markup=False)
    if wrong:
        console.print("Wrong results, so nothing is recorded:", *wrong, sep="\n  ", markup=False)
        return 1
    if csv is None and not rehearse:
        csv = RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.name.lower()).strip('-')}.csv"
    save(console, csv, suite.found, origin)
    if csv is not None:
        for path in plot(suite.found, csv.parent, csv.stem, origin["machine"]):
            console.print(f"plotted in {path}", markup=False)
    return 0
