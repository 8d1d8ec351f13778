"""The Triton kernels of `layer_norm` without a GPU: launches, bytes, determinism, wide strides."""

from __future__ import annotations

import pytest
import torch

import petl_kernels
from petl_kernels.testing import CASES, arguments, check, run

pytest.importorskip("triton")

from triton_interpreter import count_bytes, count_launches, far_apart, interpreted

from petl_kernels.ops.layer_norm import triton as implementation

CASE = next(case for case in CASES if case.name == "layer_norm")


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32, **options: object) -> dict:
    return CASE.inputs(dict(n=n, d=d, **options), dtype)


@interpreted
@pytest.mark.parametrize(
    ("n", "options", "launches"),
    [
        (32, {}, 1),
        (600, {}, 2),
        (600, dict(frozen=("x",)), 2),
        (600, dict(frozen=("x", "weight")), 2),
        (600, dict(frozen=("weight", "bias")), 1),
        (600, dict(weight=False, bias=False), 1),
    ],
    ids=["one-group", "groups", "frozen-x", "only-bias", "only-x", "no-parameters"],
)
def test_launches(n, options, launches):
    kwargs = arguments(inputs(n, 96, **options))
    wanted = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with count_launches() as forward:
        y = petl_kernels.layer_norm(**kwargs, impl="triton")
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert (forward.total(), backward.total()) == (1, launches), (forward, backward)


@interpreted
@pytest.mark.parametrize(("n", "d"), [(512, 768), (256, 1024), (128, 4096)])
@pytest.mark.parametrize("needs", [(True,) * 3, (False, True, True)], ids=["all", "frozen-x"])
def test_bytes_requested(n, d, needs):
    """Ideally x is read and y written forward; backward g and x are read and dx, where it is needed, written."""
    x, weight, bias = (inputs(n, d, torch.bfloat16)[name].detach() for name in ("x", "weight", "bias"))
    unit = x.numel() * x.element_size()
    with count_bytes() as traffic:
        y, mean, rstd = implementation.forward(x, weight, bias, 1e-5, True)
    assert traffic.within(x) == traffic.within(y) == unit
    assert traffic.total - traffic.within(weight, bias) == 2 * unit + mean.nbytes + rstd.nbytes
    g = torch.randn_like(x)
    with count_bytes() as traffic:
        dx = implementation.backward(g, x, mean, rstd, weight, bias, needs)[0]
    assert traffic.within(g) == traffic.within(x) == unit
    assert traffic.within(dx) == (unit if needs[0] else 0)
    # Partial sums, one per 32 rows, are written and read in float32: 4 x 2 x 2 bytes beside 32 x 2 of g, x and dx.
    ratio = (traffic.total - traffic.within(weight)) / ((2 + needs[0]) * unit)
    print(f"{n}x{d} {needs}: {ratio:.4f}")
    assert 1 < ratio < 1.14


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    call = inputs(600, 96, dtype)
    first, second = (run(petl_kernels.layer_norm, call, impl="triton") for _ in range(2))
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1300, 40), (130, 1500), (5, 8192), (2, 3)])
def test_wide_and_many(n, d, dtype):
    assert check(CASE, CASE.inputs(dict(n=n, d=d), dtype, torch.float32), impl="triton") == []


@interpreted
def test_rows_more_than_2_to_the_31_elements_apart():
    call = inputs(3, 32, torch.float16)
    wide = far_apart(call["x"])
    near = run(petl_kernels.layer_norm, call, impl="triton")
    far = run(petl_kernels.layer_norm, {**call, "x": wide.requires_grad_()}, impl="triton")
    for (name, a), (_, b) in zip(near.items(), far.items(), strict=True):
        assert torch.equal(a, b), name


def test_unsupported_calls_say_why():
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.layer_norm(torch.ones(2, 4, dtype=torch.float64), None, None, impl="triton")
    with pytest.raises(RuntimeError, match="at most 8192 elements, got d = 8193"):
        petl_kernels.layer_norm(torch.ones(2, 8193), None, None, impl="triton")
