"""Interleaved timing, the machine's own ceilings, and what a single call costs the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from petl_kernels.testing import Inputs, arguments

MIN_ROUNDS, MAX_ROUNDS = 3, 60
Call = Callable[[], Any]


@dataclass(frozen=True)
class Quantiles:
    """Median, 20% and 80% quantile of one provider's times, in seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Quantiles:
        low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(median.item(), low.item(), high.item())

    def over(self, count: int) -> Quantiles:
        """The same for one of `count` equal parts."""
        return Quantiles(self.median / count, self.low / count, self.high / count)


def clock(call: Call, device: str) -> float:
    """Seconds that one call takes; on a GPU its own time, with a cold L2 cache."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    _flush().zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) * 1e-3


@cache
def _flush() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # several times any L2 cache


def interleave(calls: Mapping[str, Call], device: str, seconds: float, rounds: int | None) -> dict[str, Quantiles]:
    """Time the calls in turn (A B C A B C ...), so that drifting clocks and neighbours touch all alike.

    Args:
        calls: provider -> call; each is called once to warm up, which also compiles.
        device: "cpu" or "cuda".
        seconds: what the timed rounds may take together; at least 3 rounds are run.
        rounds: an exact number of rounds instead.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, done = time.perf_counter(), 0
    while done < (rounds or MAX_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            times[name].append(clock(call, device))
        done += 1
    return {name: Quantiles.of(values) for name, values in times.items()}


def call_of(fn: Callable[..., Tensor], inputs: Inputs, mode: str, options: Mapping[str, Any]) -> Call:
    """What is timed: "forward" without grad, "backward" to every tensor that trains, or "full", both of them."""
    kwargs = {**arguments(inputs), **options}

    def forward() -> Tensor:
        with torch.no_grad():
            return fn(**kwargs)

    if mode == "forward":
        return forward
    leaves = list({id(v): v for v in kwargs.values() if isinstance(v, Tensor) and v.requires_grad}.values())
    gradient = torch.randn_like(forward())
    if mode == "backward":
        output = fn(**kwargs)
        return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)
    return lambda: torch.autograd.grad(fn(**kwargs), leaves, gradient)


def repeated(call: Call, times: int) -> Call:
    """The call, `times` times in a row: host costs are too short to clock singly."""

    def loop() -> None:
        for _ in range(times):
            call()

    return loop


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: FLOP/s in a large square matmul, bytes/s in a large copy."""

    flops: float
    bytes: float


def ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """Measure the ceilings for a dtype.

    A kernel may compute a low precision in float32, so the ceiling is the faster of the two: without bfloat16
    instructions PyTorch's own bfloat16 matmul is many times slower than its float32 one.
    """
    size = 2048 if device == "cpu" else 8192
    rates = [_matmul_rate(size, of, device) for of in {dtype, torch.float32}]
    source = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    seconds = interleave({"copy": lambda: copy.copy_(source)}, device, 1.0, 5)["copy"].low
    return Ceilings(max(rates), 2 * source.numel() * source.element_size() / seconds)


def _matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    if device == "cpu" and dtype != torch.float32:
        size //= 4  # 64 times less work: enough for a rate, and bearable at 1 GFLOP/s
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = interleave({"matmul": lambda: a @ b}, device, 1.0, 5)["matmul"].low
    return 2 * size**3 / seconds
