"""A training step measured: times of its parts, launches, saved activations, memory over time, traces."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from petl_kernels.profiling.measures import (
    ModuleTime,
    _timed,
    count_launches,
    intercept,
    saved_by_module,
    saved_bytes,
)
from petl_kernels.profiling.variants import Variant

PARTS = ("data", "forward", "backward", "optimizer")
MIB = 2**20


@dataclass
class Measured:
    """What a variant's step costs; None where it cannot be told.

    Attributes:
        step_ms, low_ms, high_ms: median, 20 % and 80 % quantile.
        host_ms: until the host has issued everything; on a CPU that is the step.
        parts_ms: data, forward, backward, optimizer, from steps of their own that wait for the device between them.
        adapters_ms: the adapters' share of forward and backward, in the same steps.
        above_frozen_ms: step_ms less that of the frozen step.
        operators: calls of operators that compute; a proxy of launches. `top_operators` has the most frequent, and
            `package_operators` this package's.
        kernel_launches: on a GPU, of kernels.
        saved_mib: kept for the backward pass; `saved_by_module` by module (adapters whole), numbers in names as "*".
        peak_mib: largest sum of what a step took from PyTorch's allocator above what stood before; `memory` is its
            course, as (milliseconds, MiB).
    """

    step_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    parts_ms: dict[str, float] = field(default_factory=dict)
    adapters_ms: dict[str, float] | None = None
    above_frozen_ms: float | None = None
    operators: int | None = None
    top_operators: dict[str, int] = field(default_factory=dict)
    package_operators: dict[str, int] = field(default_factory=dict)
    kernel_launches: int | None = None
    saved_mib: float = 0.0
    saved_by_module: dict[str, float] | None = None
    peak_mib: float | None = None
    memory: list[tuple[float, float]] = field(default_factory=list)
    trained: int = 0
    trace: str | None = None
    snapshot: str | None = None


def synchronize(device: str) -> None:
    """Wait for what was issued to the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_steps(variants: list[Variant], device: str, steps: int, tick: Callable[[], None]) -> dict[str, Measured]:
    """Time the steps of the variants in turn (A B C A B C ...), so that a drifting clock touches all alike."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    seconds: dict[str, list[tuple[float, float]]] = {v.name: [] for v in variants}
    for _ in range(steps):
        for variant in variants:
            start = now()
            variant.step()
            issued = time.perf_counter()
            seconds[variant.name].append((now() - start, issued - start))
            tick()
    parts: dict[str, list[list[float]]] = {v.name: [] for v in variants}
    adapters: dict[str, list[tuple[float, float]]] = {v.name: [] for v in variants}
    for _ in range(max(3, steps // 2)):
        for variant in variants:
            with _watched(variant) as times:
                marks = variant.step(now)
            parts[variant.name].append([end - start for start, end in pairwise(marks)])
            if times is not None:
                adapters[variant.name].append((times.forward, times.backward))
            tick()
    return {v.name: _summary(v, seconds[v.name], parts[v.name], adapters[v.name]) for v in variants}


def rounds(steps: int) -> int:
    """How many steps of each variant `time_steps` runs."""
    return steps + max(3, steps // 2)


@contextmanager
def _watched(variant: Variant) -> Iterator[ModuleTime | None]:
    """What the adapters take meanwhile, complete at the end; None where they cannot be told apart."""
    if not variant.sites or variant.compiled:  # compiled, they are part of larger kernels
        yield None
        return
    times, calls = ModuleTime(), list[Any]()
    with _sites(variant, partial(_timed, times=times, calls=calls)):
        yield times
    times.backward = sum(call.last - call.first for call in calls if call.first)


@contextmanager
def _sites(variant: Variant, watch: Callable[..., Any]) -> Iterator[None]:
    """`watch(modules, method)` around all sites."""
    with ExitStack() as stack:
        for method in sorted({site.method for site in variant.sites}):
            stack.enter_context(watch([site.module for site in variant.sites if site.method == method], method))
        yield


def _summary(variant: Variant, seconds: list[Any], parts: list[list[float]], adapters: list[Any]) -> Measured:
    whole = torch.tensor([total for total, _ in seconds], dtype=torch.float64) * 1e3
    low, median, high = whole.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    measured = Measured(median, low, high, 1e3 * statistics.median(issued for _, issued in seconds))
    measured.parts_ms = {name: 1e3 * statistics.median(values) for name, values in zip(PARTS, zip(*parts))}
    measured.trained = sum(p.numel() for p in variant.trained)
    if adapters:
        forward, backward = (1e3 * statistics.median(values) for values in zip(*adapters))
        measured.adapters_ms = {"forward": forward, "backward": backward}
    return measured


def count(variant: Variant, measured: Measured) -> None:
    """Write operators and saved activations down."""
    batch, model = variant.parts.feed.next(), variant.parts.model
    if variant.compiled:
        measured.saved_mib = saved_bytes(lambda: variant.loss(batch), exclude=model.parameters()) / MIB
        return
    counts = count_launches(variant.step)
    measured.operators, measured.top_operators = counts.total(), dict(counts.most_common(12))
    measured.package_operators = {name: n for name, n in counts.items() if name.startswith("petl_kernels::")}
    saved = saved_by_module(lambda: variant.loss(batch), model)
    measured.saved_mib = saved.total() / MIB
    grouped: Counter[str] = Counter()
    for name, size in saved.items():
        # What an adapter's parts save is the adapter's: fused, it has no parts.
        site = next((s.name for s in variant.sites if name.startswith(f"{s.name}.")), name)
        grouped[re.sub(r"(?<![^.])\d+(?![^.])", "*", site) or "(loss)"] += size
    measured.saved_by_module = {name: size / MIB for name, size in grouped.most_common()}


def trace(variant: Variant, measured: Measured, device: str, path: Path | None) -> None:
    """Profile one step; a trace for Perfetto goes to `path` (.json.gz), what it tells of memory to `measured`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.startswith("cuda") else [])
    names = {site.module: f"adapter {site.name}" for site in variant.sites}

    def labelled(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with record_function(names[module]):
            return original(*args, **kwargs)

    def watch(modules: list[nn.Module], method: str) -> Any:
        return intercept([] if variant.compiled else [(module, method) for module in modules], labelled)

    with (
        _sites(variant, watch),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        variant.step()
        synchronize(device)
    if path is None:
        return
    plain = path.with_suffix("")
    profile.export_chrome_trace(str(plain))
    text = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(text, compresslevel=4))
    events = json.loads(text)["traceEvents"]
    measured.trace = path.name
    measured.memory = _memory(events, device)
    measured.peak_mib = max((size for _, size in measured.memory), default=None)
    if device.startswith("cuda"):
        measured.kernel_launches = sum(event.get("cat") == "kernel" for event in events)


def _memory(events: list[dict[str, Any]], device: str) -> list[tuple[float, float]]:
    """The sum of what was allocated since the start, in its order: [(milliseconds, MiB)], thinned to 500 points."""
    kind = 1 if device.startswith("cuda") else 0  # of c10's device types
    found = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind
    ]
    found.sort(key=lambda each: each[0])
    if not found:
        return []
    begin, total, curve = found[0][0], 0, []
    for at, size in found:
        total += size
        curve.append(((at - begin) / 1e3, total / MIB))
    per = -(-len(curve) // 500)
    return [max(curve[i : i + per], key=lambda point: point[1]) for i in range(0, len(curve), per)]


def snapshot(variant: Variant, measured: Measured, path: Path) -> None:
    """Write the allocator's history of one step on a CUDA device, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        variant.step()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    measured.snapshot = path.name
