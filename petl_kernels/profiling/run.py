"""A target profiled: every variant built, compared with eager, timed in turn, counted and traced; one record of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import petl_kernels
from petl_kernels.env import cpu_model
from petl_kernels.profiling import step
from petl_kernels.profiling.sites import Site
from petl_kernels.profiling.target import Target, TargetError
from petl_kernels.profiling.variants import Variant, compare, make, reference

Say = Callable[[str, int, int], None]  # what is going on, how much of it is done, of how much


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        variants: names; eager is always built, because the others are compared with it.
        steps: timed steps of each.
        impl: of the fused variants; None lets every call take the fastest known.
        adapters: names or patterns of the modules that hold adapters, where they are of no known kind.
        out: the folder for traces and snapshots; None writes none, and leaves memory over time unknown.
    """

    variants: Sequence[str]
    steps: int = 10
    impl: str | None = None
    adapters: Sequence[str] = ()
    out: Path | None = None


def profile(target: Target, plan: Plan, say: Say = lambda what, done, of: None) -> dict[str, Any]:
    """Profile the steps of a target.

    Returns:
        The record, in plain JSON values: "target", "machine", "settings", "variants" (per variant the fields of
        `Measured` and its "difference" from eager, or "unavailable" and nothing else), "adapters" (where they are),
        "fuse" (fused, skipped, unavailable: name -> what or why), "wrong" (what computes something else than eager;
        such a variant was not timed).

    Raises:
        TargetError: the target cannot be built, or its step cannot run.
        ValueError: a pattern of `adapters` matches nothing.
    """
    device = target.options.device
    eager, variants, wrong = _prepared(target, plan, say)
    running = [v for v in variants if v.unavailable is None]
    total = len(running) * step.rounds(plan.steps)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        say("timing", done, total)

    say("timing", 0, total)
    measured = step.time_steps(running, device, plan.steps, tick)
    for at, variant in enumerate(running):
        say(f"counting and tracing {variant.name}", at, len(running))
        _look_closer(variant, measured[variant.name], device, plan.out)
    if "frozen" in measured:
        for each in measured.values():
            each.above_frozen_ms = each.step_ms - measured["frozen"].step_ms
    fused = next((v for v in variants if v.fuse is not None), None)
    return {
        "target": target.name,
        "machine": _machine(device),
        "settings": _settings(target, plan),
        "variants": {v.name: _record(v, measured.get(v.name)) for v in variants},
        "adapters": _kinds(eager.sites),
        "fuse": None if fused is None or fused.fuse is None else asdict(fused.fuse),
        "wrong": wrong,
    }


def _prepared(target: Target, plan: Plan, say: Say) -> tuple[Variant, list[Variant], list[str]]:
    """Eager, all variants in the plan's order, warmed up, and what is wrong with them."""
    say("building eager", 0, len(plan.variants))
    eager = make("eager", target, None, None, plan.adapters)
    first = eager.parts.feed.next()
    try:
        eager.step()
        wanted = reference(eager, first)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"{target.name}: its step failed with {type(error).__name__}: {error}") from error
    variants, wrong = [], []
    for at, name in enumerate(plan.variants):
        say(f"building {name}", at, len(plan.variants))
        variant = eager if name == "eager" else make(name, target, eager, plan.impl, plan.adapters)
        variants.append(variant)
        if variant is eager or variant.unavailable:
            continue
        try:
            if name != "frozen" and (failure := compare(variant, wanted, first)) is not None:
                wrong.append(failure)
                variant.unavailable = f"wrong: {failure}"
                continue
            variant.step()
        except Exception as error:  # no compiler, an operator that it cannot compile, an impl that cannot run
            variant.unavailable = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    for variant in variants:
        if variant.unavailable is None:
            variant.step()  # once more when all are there, as they are timed: what compiles again does it here
    return eager, variants, wrong


def _look_closer(variant: Variant, measured: step.Measured, device: str, out: Path | None) -> None:
    step.count(variant, measured)
    name = variant.name.replace("+", "-")
    if out is not None:
        step.trace(variant, measured, device, out / f"trace-{name}.json.gz")
        if device.startswith("cuda"):
            step.snapshot(variant, measured, out / f"memory-{name}.pickle")


def _record(variant: Variant, measured: step.Measured | None) -> dict[str, Any]:
    if measured is None:
        return {"unavailable": variant.unavailable}
    return {**asdict(measured), "difference": variant.difference or None}


def _kinds(sites: list[Site]) -> dict[str, dict[str, str]]:
    return {site.name: {"kind": site.kind, "class": type(site.module).__name__} for site in sites}


def _settings(target: Target, plan: Plan) -> dict[str, Any]:
    options = target.options
    return {
        "device": options.device,
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        "method": options.method,
        "options": dict(options.settings),
        "batch": options.batch,
        "steps": plan.steps,
        "impl": plan.impl,
        "seed": options.seed,
        "optimizer": "AdamW",
    }


def _machine(device: str) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "petl_kernels": petl_kernels.__version__,
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
