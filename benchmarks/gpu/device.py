"""A GPU as the suite uses it, and the CPU in its place, on which the suite is rehearsed and tested."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Device(Protocol):
    """What the suite asks of a device."""

    kind: str
    name: str
    capability: str
    l2_bytes: int
    memory_bytes: int

    def stream(self) -> AbstractContextManager[Any]:
        """The stream everything runs on: one that can be captured, because a backward follows its forward's."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def capture(self, call: Call) -> Call:
        """What launches everything that the (warmed up) call does, without its host code."""

    def seconds(self, call: Call) -> float:
        """How long the device is busy with the call."""

    def peak_bytes(self, call: Call) -> int:
        """By how much the call raises the memory in use, at most."""


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self) -> None:
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name, self.capability = properties.name, f"{properties.major}.{properties.minor}"
        self.l2_bytes, self.memory_bytes = properties.L2_cache_size, properties.total_memory
        self._stream = torch.cuda.Stream()
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Call) -> Call:
        # Not torch.cuda.graph: it collects garbage and empties the allocator's cache each time, half a second of a
        # suite that captures hundreds of graphs.
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with self.stream():
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
        return graph.replay

    def seconds(self, call: Call) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3

    def peak_bytes(self, call: Call) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Rehearsal:
    """The CPU as if it were a GPU: all of the suite's code runs, and none of its figures mean anything."""

    kind = "cpu"
    name, capability = "rehearsal on the CPU", "0.0"
    l2_bytes, memory_bytes = 1 << 14, 1 << 33

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def capture(self, call: Call) -> Call:
        call()
        return call

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0
