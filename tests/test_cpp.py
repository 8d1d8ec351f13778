"""What only the C++ kernels have: instruction sets, 16-bit conversions, threads, tensors past 2^31 elements."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from table import setting

from petl_kernels import _cpu, bottleneck_adapter
from petl_kernels.testing import CASES, check, check_draws, run

ISAS = _cpu.isas()
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_every_instruction_set_is_correct(name: str, dtype: torch.dtype) -> None:
    for case in (c for c in CASES if "cpp" in c.op.impls):
        for sample in case.samples:
            with setting(name):
                draw = partial(case.inputs, sample, dtype, None, "cpu")
                assert not check_draws(case, draw, impl="cpp"), sample["id"]


def test_the_widest_instruction_set_is_the_default() -> None:
    assert set(ISAS) <= set(_cpu.built_isas())
    assert _cpu.isa() in ISAS


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set_isa: name must be one of .* got mmx"):
        _cpu.set_isa("mmx")


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_value_survives(name: str, dtype: torch.dtype) -> None:
    """Widened and narrowed again (residual -> y of a branch that is zero) each pattern is itself, NaN stays NaN."""
    values = every_value(dtype).reshape(64, 1024)
    zero = torch.zeros(1, 1024, dtype=dtype)
    with setting(name):
        y = bottleneck_adapter(torch.zeros_like(values), zero, None, zero.t(), None, residual=values, impl="cpp")
    torch.testing.assert_close(y, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_to_nearest_even(name: str, dtype: torch.dtype) -> None:
    """Float32 values of every magnitude, ties included, narrow as torch narrows them."""
    exact = every_value(dtype).float()
    between = (exact[:-1] + exact[1:]) / 2
    values = torch.cat(
        [exact, between, torch.nextafter(between, exact[1:]), torch.tensor([3.4e38, 1e-45, 65519.9, 65520.0])]
    )
    x, zero = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=torch.float32)
    with setting(name):
        y = bottleneck_adapter(x, zero, None, zero.expand(values.numel(), 1), values, impl="cpp")
    torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    case = CASES[0]
    inputs = case.inputs({"n": 700, "d": 160, "r": 24, "scale": ("d_out",)})
    with setting(threads=threads):
        assert not check(case, inputs, impl="cpp")
        first, second = (run(case.fn, inputs, impl="cpp") for _ in range(2))
    for (name, a), (_, b) in zip(first.items(), second.items()):
        assert torch.equal(a, b), name


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows of a 4.3 GB output are right: offsets do not wrap."""
    n, d = 2**15 + 3, 2**16
    x = torch.ones(1, d, dtype=torch.bfloat16).expand(n, d)
    w = torch.full((1, d), 1 / d, dtype=torch.bfloat16)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        y = bottleneck_adapter(x, w, None, w.t(), None, residual=x, activation="identity", scale=float(d), impl="cpp")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert y.numel() > 2**31
    for row in (0, n // 2, n - 1):
        assert torch.equal(y[row], torch.full((d,), 2.0, dtype=torch.bfloat16))
