"""Every CPU kernel in an address space that is too small, by steps from nothing left to just enough.

Started by `test_out_of_memory.py`: a limit on the address space is for a whole process. Prints, per op and for the
optimizer's step, how many calls failed, and how many of these inside of a kernel, where C++ said so.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl_kernels.optim import ChannelAdamW, Channels
from petl_kernels.testing import CASES, run

STEP = 1 << 18  # bytes
SIZES = dict(n=1500, d=128, r=64, k=96, d_out=128, dropout=0.0)


def failing(attempt: Callable[[], Any], check: Callable[[], None]) -> tuple[Any, int, int]:
    """Call `attempt` with more and more memory until it succeeds; `check` after each that has failed."""
    attempt()  # threads, and what libraries keep
    before = resource.getrlimit(resource.RLIMIT_AS)
    failed = inside = 0
    for margin in range(0, 1 << 32, STEP):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + margin, before[1]))
            result = attempt()
        except (MemoryError, RuntimeError) as error:
            resource.setrlimit(resource.RLIMIT_AS, before)
            assert isinstance(error, MemoryError) or "can't allocate memory" in str(error), error
            failed, inside = failed + 1, inside + isinstance(error, MemoryError)
            check()
        else:
            resource.setrlimit(resource.RLIMIT_AS, before)
            return result, failed, inside
    raise AssertionError("never enough")


def op(case: Any) -> tuple[int, int]:
    call = case.inputs({**case.typical, **{k: v for k, v in SIZES.items() if k in case.typical}, "tokens": ()})
    expected = run(case.fn, call, impl="cpp")
    before = {name: value.detach().clone() for name, value in call.items() if isinstance(value, Tensor)}

    def check() -> None:
        assert all(torch.equal(call[name], value) for name, value in before.items())

    outcome, failed, inside = failing(lambda: run(case.fn, call, impl="cpp"), check)
    for (name, got), (_, wanted) in zip(outcome.items(), expected.items(), strict=True):
        assert torch.equal(got, wanted), name
    return failed, inside


def optimizer() -> tuple[int, int]:
    """The first step, which makes the state, anew in every attempt."""
    params = [torch.randn(512, 512) for _ in range(6)]
    for p in params:
        p.requires_grad_().grad = torch.randn(512, 512)
    before = [p.detach().clone() for p in params]

    def step() -> int:
        with torch.no_grad():
            for p, value in zip(params, before):
                p.copy_(value)
        made = ChannelAdamW([Channels(params[0], torch.arange(0, 512, 2)), *params[1:]], lr=0.1, impl="cpp")
        try:
            made.step()
        finally:
            count = len(made.state)
            assert count in (0, len(params)), count
        return count

    def check() -> None:
        assert all(torch.equal(p, value) for p, value in zip(params, before))

    states, failed, inside = failing(step, check)
    assert states == len(params)
    return failed, inside


if __name__ == "__main__":
    torch.set_num_threads(2)
    for case in CASES:
        print(case.name, *op(case))
    print("optimizer", *optimizer())
