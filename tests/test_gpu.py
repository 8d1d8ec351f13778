"""What only a GPU can show: far rows, captured graphs, streams, a second device, determinism at full size.

`pytest -m gpu` runs it there, beside all that the table's tests run on a GPU (tests/table.py). The checks themselves
are tried on the CPU here, right and wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sanitize
import torch
from gpu_checks import (
    a_stream_of_its_own_gives_the_same,
    another_device_gives_the_same,
    far_rows,
    replay_equals_eager,
    ten_runs_are_bit_identical,
)
from table import demanded

from petl_kernels.testing import CASES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu.device import Cuda, Rehearsal

HERE = torch.cuda.is_available()
FAR = 2**31
EVERYWHERE = pytest.mark.parametrize(
    "case, impl",
    [
        pytest.param(case, impl, id=f"{case.name}-{impl}")
        for case in CASES
        for impl in ("triton", "cuda")
        if impl in case.op.impls
    ],
)


def on_gpu(test: Any) -> Any:
    """Every case on Triton and on the CUDA kernels, marked `gpu`, skipped where there is none."""
    marked = pytest.mark.skipif(not HERE, reason="needs a CUDA device")(EVERYWHERE(test))
    return pytest.mark.gpu(marked)


@on_gpu
def test_a_replayed_graph_equals_eager(case, impl):
    device = Cuda()
    with device.stream():
        replay_equals_eager(case, impl, "cuda", device.capture)


@on_gpu
def test_ten_runs_at_full_size_are_bit_identical(case, impl):
    ten_runs_are_bit_identical(case, impl, "cuda")


@on_gpu
def test_rows_behind_the_2_to_the_31st_element(case, impl):
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * FAR:  # x, residual, y, their gradients and copies, 2 bytes each
        pytest.skip(f"needs {20 * FAR >> 30} GiB of free memory, there are {free >> 30}")
    far_rows(case, impl, "cuda", FAR)


@on_gpu
def test_a_stream_of_its_own(case, impl):
    a_stream_of_its_own_gives_the_same(case, impl)


@on_gpu
def test_a_second_device(case, impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    another_device_gives_the_same(case, impl)


# The checks, tried on the CPU.
ON_CPU = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CPP = pytest.mark.skipif(not demanded("cpp"), reason="PETL_KERNELS_TEST_IMPLS leaves the C++ kernels out")


@CPP
@ON_CPU
def test_the_checks_pass_on_the_cpu(case):
    replay_equals_eager(case, "cpp", "cpu", Rehearsal().capture)
    ten_runs_are_bit_identical(case, "cpp", "cpu", n=2)
    far_rows(case, "cpp", "cpu", 1 << 16)


@CPP
@ON_CPU
def test_a_graph_that_was_not_replayed_is_noticed(case):
    def dead(call):
        call()
        return lambda: None

    with pytest.raises(AssertionError):
        replay_equals_eager(case, "cpp", "cpu", dead)


@CPP
@pytest.mark.parametrize("entry", ["forward", "backward"])
@ON_CPU
def test_a_last_row_that_was_not_reached_is_noticed(case, entry, monkeypatch):
    if entry not in case.op.directions:
        pytest.skip("the op has no such direction")
    direction = case.op.directions[entry]
    real = getattr(case.op.module("cpp"), entry)

    def short(*args):
        results = real(*args)
        for t in results if isinstance(results, (tuple, list)) else (results,):
            t[-1:] = 0  # of the rows, or of whatever else it gives
        return results

    monkeypatch.setitem(direction._callables, "cpp", short)
    with pytest.raises(AssertionError, match="error"):
        far_rows(case, "cpp", "cpu", 1 << 16)


@CPP
def test_a_run_that_differs_is_noticed(monkeypatch):
    case = CASES[0]
    real, calls = case.op.module("cpp").forward, []

    def unsteady(*args):
        calls.append(1)
        y, z = real(*args)
        return y + (len(calls) == 7), z

    monkeypatch.setitem(case.op.directions["forward"]._callables, "cpp", unsteady)
    with pytest.raises(AssertionError):
        ten_runs_are_bit_identical(case, "cpp", "cpu", n=2)


@CPP
def test_what_the_sanitizer_watches_is_right_and_a_wrong_result_is_an_error(monkeypatch, capsys):
    case = next(case for case in CASES if case.name == "layer_norm")
    command = ["--device", "cpu", "--impl", "cpp", "--op", case.name]
    assert sanitize.main(command) == 0
    real = case.op.module("cpp").backward
    broken = lambda *args: tuple(torch.zeros_like(t) for t in real(*args))  # noqa: E731
    monkeypatch.setitem(case.op.directions["backward"]._callables, "cpp", broken)
    assert sanitize.main(command) == 1 and f"{case.name} typical torch.float32 cpp: d" in capsys.readouterr().out
    assert sanitize.main(["--impl", "fast"]) == 1  # nothing ran
