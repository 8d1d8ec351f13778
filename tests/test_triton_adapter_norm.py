"""The Triton kernels of `adapter_norm` without a GPU: launches, bytes, determinism, what they refuse."""

from __future__ import annotations

import pytest
import torch

import petl_kernels
from petl_kernels.testing import CASES, arguments, check, run

pytest.importorskip("triton")

from triton_interpreter import count_bytes, count_launches, interpreted, recorded_targets

from petl_kernels.ops.adapter_norm import triton as implementation

CASE = next(case for case in CASES if case.name == "adapter_norm")


@interpreted
@pytest.mark.parametrize(
    ("n", "options", "launches"),
    [
        (16, {}, 2),
        (600, {}, 3),
        (600, dict(frozen=("ln_weight", "ln_bias"), norm="rms"), 3),
        (600, dict(frozen=("x", "w_down", "b_down", "w_up", "b_up")), 2),
    ],
    ids=["one-tile", "tiles", "frozen-norm", "frozen-adapter"],
)
def test_launches(n, options, launches):
    kwargs = arguments(CASE.inputs(dict(n=n, d=96, r=16, **options), torch.bfloat16))
    wanted = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with count_launches() as forward:
        y = petl_kernels.adapter_norm(**kwargs, impl="triton")
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert (forward.total(), backward.total()) == (1, launches), (forward, backward)


@interpreted
@pytest.mark.parametrize(
    ("size", "dtype", "forward", "backward"),
    [((256, 768, 64), torch.bfloat16, 3.1, 9.2), ((256, 768, 16), torch.bfloat16, 3.03, 8.25)],
    ids=["r64", "r16"],
)
def test_bytes_requested(size, dtype, forward, backward, monkeypatch):
    """Passes over N x d, parameters, their gradients and partial sums apart.

    Forward 3 is the least: x and residual read, y written. Backward: 5 to the gradient of the sum (g read twice, x and
    residual once, du written), 3 to dx and the weights' gradients (du and x read, dx written); the rest is z and dz.
    """
    call = CASE.inputs(dict(n=size[0], d=size[1], r=size[2]), dtype)
    x, residual, *weights = (
        call[name].detach() for name in ("x", "residual", "w_down", "b_down", "w_up", "b_up", "ln_weight", "ln_bias")
    )
    unit, g = x.numel() * x.element_size(), torch.randn_like(x)
    targets = recorded_targets(monkeypatch, implementation)
    with count_bytes() as traffic:
        y, *kept = implementation.forward(x, residual, None, *weights, None, 1.0, "gelu", "layer", 1e-5, True, False)
    passes_forward = (traffic.total - traffic.within(*weights)) / unit
    assert traffic.within(y) == traffic.within(x) == traffic.within(residual) == unit
    with count_bytes() as traffic:
        needs = (True,) * 8 + (False,)
        dx, du, *grads = implementation.backward(
            g, x, residual, None, *kept, *weights, None, 1.0, "gelu", "layer", True, needs
        )
    passes_backward = (traffic.total - traffic.within(*weights, *targets, *grads)) / unit
    assert traffic.within(dx) == traffic.within(residual) == unit
    assert traffic.within(du) == traffic.within(x) == traffic.within(g) == 2 * unit
    print(f"{size}: forward {passes_forward:.3f}, backward {passes_backward:.3f}")
    assert 3 <= passes_forward <= forward and 8 <= passes_backward <= backward


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    call = CASE.inputs(dict(n=300, d=96, r=16, scale=("d_out",)), dtype)
    first, second = (run(petl_kernels.adapter_norm, call, impl="triton") for _ in range(2))
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


def test_unsupported_calls_say_why():
    call = arguments(CASE.inputs(dict(n=2, d=8, r=129)))
    with pytest.raises(RuntimeError, match="bottleneck is at most 128 wide, got r = 129"):
        petl_kernels.adapter_norm(**call, impl="triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sample", [dict(n=21, d=1100, r=128), dict(n=20, d=900, r=3, norm="rms"), dict(n=5, d=2100, r=20)], ids=str
)
def test_rows_too_wide_to_hold(sample, dtype):
    assert check(CASE, CASE.inputs(sample, dtype, torch.float32), impl="triton") == []
