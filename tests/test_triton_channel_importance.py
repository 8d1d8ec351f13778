"""The Triton kernels of `channel_importance` without a GPU: launches, bytes, determinism, wide strides."""

from __future__ import annotations

import pytest
import torch

import petl_kernels
from petl_kernels.testing import CASES, check

pytest.importorskip("triton")

from triton_interpreter import count_bytes, count_launches, far_apart, interpreted

from petl_kernels.ops.channel_importance import triton as implementation

CASE = next(case for case in CASES if case.name == "channel_importance")


def inputs(leading: tuple[int, ...], d: int, dtype: torch.dtype = torch.float32, **options: object) -> dict:
    return CASE.inputs(dict(leading=leading, d=d, **options), dtype)


@interpreted
@pytest.mark.parametrize(
    ("leading", "reduction", "launches"),
    [
        ((100,), "sq_batch", 1),
        ((100,), "sq_sample", 1),
        ((1000,), "sq_batch", 2),
        ((1000,), "abs", 2),
        ((8, 197), "sq_sample", 2),
        ((1, 197), "sq_sample", 1),
    ],
)
def test_launches(leading, reduction, launches):
    call = inputs(leading, 96, reduction=reduction)
    with count_launches() as counted:
        petl_kernels.channel_importance(**call, impl="triton")
    assert counted.total() == launches, counted


@interpreted
@pytest.mark.parametrize(
    ("leading", "d", "reduction", "ratio"),
    # Partial sums, written and read in float64, are what is above one read of each operand.
    [
        ((1024,), 768, "sq_batch", 1.04),
        ((1024,), 768, "abs", 1.04),
        ((16, 197), 768, "sq_sample", 1.03),
        ((2048,), 100, "sq_batch", 1.04),
    ],
)
def test_bytes_requested(leading, d, reduction, ratio):
    call = inputs(leading, d, torch.bfloat16, reduction=reduction)
    operands = call["activation"], call["grad"]
    with count_bytes() as traffic:
        implementation.forward(*operands, reduction)
    ideal = sum(t.numel() * t.element_size() for t in operands)
    print(f"{leading} x {d} {reduction}: {traffic.total / ideal:.4f}")
    assert traffic.within(*operands) == ideal
    assert 1 < traffic.total / ideal <= ratio


@interpreted
@pytest.mark.parametrize("reduction", ["sq_batch", "sq_sample", "abs"])
def test_deterministic(reduction):
    call = inputs((6, 300), 96, reduction=reduction)
    first, second = (petl_kernels.channel_importance(**call, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("leading", "d", "reduction"),
    [((40, 33), 130, "sq_sample"), ((3000,), 24, "sq_sample"), ((2500,), 200, "sq_batch"), ((9, 300), 200, "abs")],
)
def test_many_groups(leading, d, reduction, dtype):
    assert check(CASE, inputs(leading, d, dtype, reduction=reduction), impl="triton") == []


@interpreted
def test_rows_more_than_2_to_the_31_elements_apart():
    call = inputs((3,), 32, torch.float16)
    wide = far_apart(call["activation"])
    near = petl_kernels.channel_importance(**call, impl="triton")
    assert torch.equal(petl_kernels.channel_importance(**{**call, "activation": wide}, impl="triton"), near)


def test_unsupported_calls_say_why():
    x = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.channel_importance(x, x, impl="triton")
