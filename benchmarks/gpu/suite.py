"""Every op on one GPU: first whether it is right, then how long it takes beside eager, its compilation and others.

The time is shared out: a fifth for checking, up to seven tenths for the ops, the rest for training steps. What there
is no time for is left out and counted; the order of `plan.units` says what comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gpu import lora
from gpu.clocks import Times, copies, copy_rate, first_line, replayed, times
from gpu.device import Call, Device
from gpu.plan import Budget, Unit
from gpu.report import Measurement, print_group
from petl_kernels.benchmarking.libraries import astray, baselines
from petl_kernels.benchmarking.options import DTYPES
from petl_kernels.benchmarking.timing import call_of
from petl_kernels.ops._op import REFERENCE
from petl_kernels.profiling import saved_bytes
from petl_kernels.testing import Inputs, arguments, check

CHECKS, OPS = 0.2, 0.7  # of the time has passed when checking and when the ops are over
COMPILE, AUTOTUNE = 0.3, 0.12  # of it may go into compiling
# Seconds, until one has been seen: a first one that is begun too late would end too late.
EXPECTED = {"compile": 10.0, "max-autotune": 40.0, "step": 10.0, "step compiled": 40.0}
MODES = ("forward", "backward", "full")
Provider = tuple[Callable[..., Any], dict[str, Any]]


@dataclass
class Suite:
    """One run: its device, its time, who is asked, and what was found.

    Attributes:
        kernels: names of implementations to time; where None, all that run there.
        found: the measurements; `notes`: what was left out and why.
    """

    device: Device
    budget: Budget
    console: Console
    kernels: Sequence[str] | None = None
    compile: bool = True

    def __post_init__(self) -> None:
        self.found: list[Measurement] = []
        self.notes: list[str] = []
        self.rate = copy_rate(self.device)
        self.console.print(f"copy: {self.rate / 1e9:.0f} GB/s")

    def implementations(self, unit: Unit, inputs: Inputs) -> list[str]:
        """The kernels that run this call here."""
        call = unit.case.op.prepare(**arguments(inputs))
        names = [n for n in unit.case.op.impls if n != REFERENCE and (self.kernels is None or n in self.kernels)]
        if os.environ.get("TRITON_INTERPRET") == "1":  # the time of an interpreter means nothing
            names = [name for name in names if name != "triton"]
        return [name for name in names if unit.case.op.unsupported(name, *call) is None]

    def inputs(self, unit: Unit) -> Inputs:
        return unit.case.inputs(unit.sample, DTYPES[unit.dtype], device=self.device.kind)

    def check(self, units: Sequence[Unit]) -> tuple[list[Unit], list[str]]:
        """The units whose results were looked at in time, and what was wrong with them."""
        seen, wrong = [], []
        for index, unit in enumerate(units):
            if not self.budget.allows("check", CHECKS):
                self.notes.append(f"{len(units) - index} of {len(units)} calls, for which there was no time")
                break
            try:
                wrong += self.budget.run("check", partial(self._failures, unit))
                seen.append(unit)
            except torch.OutOfMemoryError:
                self.notes.append(f"{unit.label}: its check in float64 does not fit the memory")
        return seen, wrong

    def _failures(self, unit: Unit) -> list[str]:
        inputs = self.inputs(unit)
        found = [
            f"{unit.label} {n}: {f}"
            for n in self.implementations(unit, inputs)
            for f in check(unit.case, inputs, impl=n)
        ]
        for name, fn in self.rivals(unit).items():
            found += [f"{unit.label} {name}: {f}" for f in astray(unit.case, inputs, fn)]
        return found

    def rivals(self, unit: Unit) -> Mapping[str, Callable[..., Tensor]]:
        """What others do for this call."""
        two_gemm = {"two-GEMM LoRA": lora.bottleneck_adapter} if unit.lora and lora.runs_on(self.device.kind) else {}
        return {**baselines(unit.case), **two_gemm}

    def time(self, units: Sequence[Unit]) -> None:
        """Time every unit for which there is time."""
        for index, unit in enumerate(units):
            if not self.budget.allows("op", OPS):
                self.notes.append(f"{len(units) - index} of {len(units)} calls that were checked, for lack of time")
                break
            try:
                inputs = self.inputs(unit)
                who = self._providers(unit, inputs)
                group = self.budget.run("op", partial(self._measure, unit, inputs, who))
            except torch.OutOfMemoryError:
                self.notes.append(f"{unit.label}: it does not fit the memory")
                continue
            self.found += group
            print_group(self.console, group)

    def _providers(self, unit: Unit, inputs: Inputs) -> dict[str, Provider]:
        fn = unit.case.fn
        found: dict[str, Provider] = {"eager": (fn, {"impl": REFERENCE})}
        torch._dynamo.reset()  # each shape is compiled for itself
        for name, mode, share in (
            ("compile", None, COMPILE),
            # Without the graphs that this mode would make of its own accord, since everybody's is captured here.
            ("max-autotune", "max-autotune-no-cudagraphs", AUTOTUNE),
        ):
            if self.compile and self.budget.allows(name, OPS, share):
                options: dict[str, Any] = dict(fullgraph=True, dynamic=False, mode=mode)
                compiled = torch.compile(fn, **options)
                if self._compiles(unit, name, compiled, inputs):
                    found[name] = (compiled, {"impl": REFERENCE})
        found |= {name: (rival, {}) for name, rival in self.rivals(unit).items()}
        return found | {name: (fn, {"impl": name}) for name in self.implementations(unit, inputs)}

    def _compiles(self, unit: Unit, name: str, fn: Callable[..., Tensor], inputs: Inputs) -> bool:
        """Compile everything that will be timed, so that it counts as compiling."""

        def work() -> None:
            for mode in self.modes(unit):
                call_of(fn, clone(inputs), mode, {"impl": REFERENCE})()

        try:
            self.budget.run(name, work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says, the others are still to be timed
            self.notes.append(f"{unit.label}: {name} failed: {first_line(error)}")
            return False
        return True

    def modes(self, unit: Unit) -> tuple[str, ...]:
        return MODES if unit.case.differentiable else ("forward",)

    def _measure(self, unit: Unit, inputs: Inputs, who: Mapping[str, Provider]) -> list[Measurement]:
        call = unit.case.op.prepare(**arguments(inputs))
        assert unit.case.op.sizes is not None
        sizes = unit.case.op.sizes(*call)
        count = copies(self.device, sum(t.nbytes for t in _distinct(inputs)))
        found = []
        for mode in self.modes(unit):
            sets = {name: [clone(inputs) for _ in range(count)] for name in who}  # some write to a weight
            calls: dict[str, list[Call]] = {
                n: [call_of(fn, one, mode, options) for one in sets[n]] for n, (fn, options) in who.items()
            }
            taken, notes = times(self.device, calls)
            self.notes += [f"{unit.label} {mode}: {note}" for note in notes]
            moved = unit.case.cost(unit.sample, mode)[1] * DTYPES[unit.dtype].itemsize
            for name, (fn, options) in who.items():
                memory: dict[str, int] = {"peak_bytes": self.device.peak_bytes(calls[name][0])}
                if mode == "full" or not unit.case.differentiable:
                    memory["saved_bytes"] = saved_bytes(lambda: fn(**arguments(inputs), **options))  # noqa: B023
                found.append(self._measurement(unit, name, mode, taken[name], moved, sizes, **memory))
                if name in ("compile", "max-autotune") and taken[name].cold is not None:
                    graph = replayed(self.device, calls[name][0])
                    found.append(self._measurement(unit, f"{name}+graph", mode, graph, moved, sizes))
        return found

    def _measurement(
        self, unit: Unit, name: str, mode: str, taken: Times, moved: int, sizes: Sequence[int], **memory: int
    ) -> Measurement:
        where = (self.rate, self.device.capability, sizes, memory.get("saved_bytes"), memory.get("peak_bytes"))
        return Measurement(unit.case.name, name, mode, unit.sample, unit.dtype, taken, moved, *where)


def _distinct(inputs: Inputs) -> list[Tensor]:
    return list({id(v): v for v in inputs.values() if isinstance(v, Tensor)}.values())


def clone(inputs: Inputs) -> Inputs:
    """The same call on memory of its own; what is one tensor stays one."""
    made = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in _distinct(inputs)}
    return {name: made.get(id(value), value) for name, value in inputs.items()}
