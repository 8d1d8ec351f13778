"""The Triton kernels of `channel_scale` without a GPU: launches, bytes, determinism, wide strides."""

from __future__ import annotations

import pytest
import torch

import petl_kernels
from petl_kernels.testing import CASES, arguments, check, run

pytest.importorskip("triton")

from triton_interpreter import count_bytes, count_launches, far_apart, interpreted

from petl_kernels.ops.channel_scale import triton as implementation

CASE = next(case for case in CASES if case.name == "channel_scale")


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32, **options: object) -> dict:
    return CASE.inputs(dict(n=n, d=d, **options), dtype)


@interpreted
@pytest.mark.parametrize(
    ("n", "options", "launches"),
    [(32, {}, 1), (600, {}, 2), (600, dict(frozen=("x",)), 2), (600, dict(frozen=("scale",)), 1)],
    ids=["one-group", "groups", "frozen-x", "frozen-scale"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches(n, options, launches, dtype):
    """As many where the scale stays in float32: nothing is cast outside of the kernels."""
    kwargs = arguments(CASE.inputs(dict(n=n, d=96, **options), dtype, torch.float32))
    wanted = [v for v in kwargs.values() if v.requires_grad]
    with count_launches() as forward:
        y = petl_kernels.channel_scale(**kwargs, impl="triton")
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert (forward.total(), backward.total()) == (1, launches), (forward, backward)


@interpreted
@pytest.mark.parametrize(("n", "d"), [(512, 768), (256, 1000), (128, 3072)])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=["all", "frozen-x", "frozen-scale"])
def test_bytes_requested(n, d, needs):
    """Ideally x is read and y written forward; backward g is, x for dscale, and dx, where it is needed, written."""
    x, scale = (inputs(n, d, torch.bfloat16)[name].detach() for name in ("x", "scale"))
    unit = x.numel() * x.element_size()
    with count_bytes() as traffic:
        y = implementation.forward(x, scale)
    assert traffic.within(x) == traffic.within(y) == unit
    assert traffic.total - traffic.within(scale) == 2 * unit
    g = torch.randn_like(x)
    with count_bytes() as traffic:
        dx = implementation.backward(g, x if needs[1] else None, scale, needs)[0]
    assert traffic.within(g) == unit
    assert traffic.within(x) == (unit if needs[1] else 0)
    assert traffic.within(dx) == (unit if needs[0] else 0)
    # Partial sums, one per 32 rows, are written and read in float32: 4 x 2 bytes beside 32 x 2 of g, x and dx each.
    ratio = (traffic.total - traffic.within(scale)) / ((1 + sum(needs)) * unit)
    print(f"{n}x{d} {needs}: {ratio:.4f}")
    assert 1 <= ratio < (1.07 if needs[1] else 1.0001)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    call = inputs(600, 96, dtype)
    first, second = (run(petl_kernels.channel_scale, call, impl="triton") for _ in range(2))
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1300, 40), (130, 1500), (5, 11008), (2, 3)])
def test_wide_and_many(n, d, dtype):
    assert check(CASE, CASE.inputs(dict(n=n, d=d), dtype, torch.float32), impl="triton") == []


@interpreted
def test_rows_more_than_2_to_the_31_elements_apart():
    call = inputs(3, 32, torch.float16)
    wide = far_apart(call["x"])
    near = run(petl_kernels.channel_scale, call, impl="triton")
    far = run(petl_kernels.channel_scale, {**call, "x": wide.requires_grad_()}, impl="triton")
    for (name, a), (_, b) in zip(near.items(), far.items(), strict=True):
        assert torch.equal(a, b), name


def test_unsupported_calls_say_why():
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.channel_scale(torch.ones(2, 4).double(), torch.ones(4).double(), impl="triton")
