"""The four times of a call on a GPU, taken in turn with those of its rivals.

Cold and hot: on the GPU alone, as one of many calls in a CUDA graph, so that no launch is waited for. Hot calls have
all the same operands; cold ones take turns among copies that together are twice the L2 cache. Wall and host: of
ordinary launches, a few calls one behind the other; the host's time ends when the last is launched, wall when it is
done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from gpu.device import Call, Device
from petl_kernels.benchmarking.timing import Quantiles

ROUNDS = 7
IN_A_GRAPH = 1e-3  # seconds of calls that a graph holds at least: the resolution of events is half a microsecond
MOST_CALLS, MOST_COPIES = 64, 64
LAUNCHED = 20  # calls in a row; the queue of a GPU takes about a thousand launches before the host has to wait


@dataclass(frozen=True)
class Times:
    """Seconds per call; cold and hot are None where a call cannot be captured."""

    cold: Quantiles | None
    hot: Quantiles | None
    wall: Quantiles
    host: Quantiles


def copies(device: Device, operand_bytes: int) -> int:
    """How many sets of operands keep the L2 cache from holding the next one."""
    return max(1, min(MOST_COPIES, math.ceil(2 * device.l2_bytes / max(1, operand_bytes))))


def _graph(device: Device, calls: Sequence[Call], estimate: float) -> tuple[Call, int]:
    """A graph of so many calls that it can be timed, and their number."""
    count = max(len(calls), min(MOST_CALLS, math.ceil(IN_A_GRAPH / max(estimate, 1e-7))))

    def several() -> None:
        for call in islice(cycle(calls), count):
            call()

    replay = device.capture(several)
    replay()
    return replay, count


def _launched(device: Device, call: Call, count: int) -> tuple[float, float]:
    """Seconds per call until the last is done, and until it is launched."""
    device.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    launched = time.perf_counter()
    device.synchronize()
    return (time.perf_counter() - start) / count, (launched - start) / count


def first_line(error: Exception) -> str:
    """What an error says, as far as a note has room."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def times(device: Device, providers: Mapping[str, Sequence[Call]]) -> tuple[dict[str, Times], list[str]]:
    """The times of every provider, in turn, and what could not be captured and why.

    Args:
        device: where they run, under its stream.
        providers: name -> the same call on each copy of its operands.
    """
    graphs: dict[str, list[tuple[Call, int]]] = {}
    estimates, notes = {}, []
    for name, calls in providers.items():
        for call in calls:
            call()  # compiles, allocates, and is what a capture wants to have seen
        estimates[name] = device.seconds(calls[0])
        try:
            graphs[name] = [_graph(device, each, estimates[name]) for each in (calls, calls[:1])]
        except RuntimeError as error:
            notes.append(f"{name} is not captured: {first_line(error)}")
    found: dict[str, list[list[float]]] = {name: [[], [], [], []] for name in providers}
    for _ in range(ROUNDS):
        for name, calls in providers.items():
            for values, (replay, count) in zip(found[name], graphs.get(name, ())):
                values.append(device.seconds(replay) / count)
            count = max(3, min(LAUNCHED, math.ceil(LAUNCHED * 1e-3 / max(estimates[name], 1e-7))))
            for values, seconds in zip(found[name][2:], _launched(device, calls[0], count)):
                values.append(seconds)
    quantiles = {name: [Quantiles.of(v) if v else None for v in values] for name, values in found.items()}
    return {name: Times(*values) for name, values in quantiles.items()}, notes  # type: ignore[arg-type]


def replayed(device: Device, call: Call) -> Times:
    """Wall and host time per replay of a graph of this one call: `torch.compile` and a CUDA graph together."""
    call()
    replay = device.capture(call)
    replay()
    wall, host = zip(*(_launched(device, replay, LAUNCHED) for _ in range(ROUNDS)))
    return Times(None, None, Quantiles.of(list(wall)), Quantiles.of(list(host)))


def copy_rate(device: Device) -> float:
    """Bytes per second of a large copy, read and written, on this device in this run."""
    size = 2**28 if device.kind == "cuda" else 2**16
    source = torch.ones(size, dtype=torch.float32, device=device.kind)
    copy = torch.empty_like(source)
    seconds = min(device.seconds(lambda: copy.copy_(source)) for _ in range(ROUNDS))
    return 2 * source.nbytes / seconds
