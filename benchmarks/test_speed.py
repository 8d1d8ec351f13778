"""The same calls under pytest-benchmark, to compare work in progress: `pytest benchmarks --benchmark-only`.

`--benchmark-autosave` and `--benchmark-compare` keep and compare runs. The figures that are published come from
`petl-kernels bench`, which interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petl_kernels.benchmarking.timing import call_of
from petl_kernels.testing import CASES, arguments

ROWS = [
    pytest.param(case, sample, mode, impl, id=f"{case.name}-{sample['id']}-{mode}-{impl}")
    for case in CASES
    for sample in (case.host, *case.bench)
    for mode in ("forward", "full")
    for impl in case.op.impls
]


@pytest.mark.parametrize("case, sample, mode, impl", ROWS)
def test_speed(benchmark: Any, case: Any, sample: Any, mode: str, impl: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = case.inputs(sample, device=device)
    reason = case.op.unsupported(impl, *case.op.prepare(**arguments(inputs)))
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = f"{case.name} {sample['id']} {mode}"
    call = call_of(case.fn, inputs, mode, {"impl": impl})

    def timed() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
    if benchmark.stats is not None:  # it is not disabled
        moved = case.cost(sample, mode if case.differentiable else "forward")[1] * 4  # bytes of float32
        benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9
