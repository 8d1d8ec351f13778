"""The Triton kernels of `adapter_norm` and `norm_adapter` without a GPU: launches, bytes, determinism, refusals."""

from __future__ import annotations

import pytest
import torch

from petl_kernels.testing import CASES, arguments, check, run

pytest.importorskip("triton")

from triton_interpreter import count_bytes, count_launches, interpreted, recorded_targets

from petl_kernels.ops.adapter_norm import triton as implementation
from petl_kernels.ops.norm_adapter import triton as pre_norm

CASE = next(case for case in CASES if case.name == "adapter_norm")
PRE = next(case for case in CASES if case.name == "norm_adapter")
BOTH = pytest.mark.parametrize("case", [CASE, PRE], ids=lambda case: case.name)


@interpreted
@pytest.mark.parametrize(
    ("case", "n", "options", "launches"),
    [
        (CASE, 16, {}, 2),
        (CASE, 140, {}, 3),
        (CASE, 140, dict(frozen=("ln_weight", "ln_bias"), norm="rms"), 3),
        (CASE, 140, dict(frozen=("x", "w_down", "b_down", "w_up", "b_up")), 2),
        (PRE, 16, {}, 3),
        (PRE, 140, {}, 3),
        (PRE, 140, dict(frozen=("w_down", "b_down", "w_up", "b_up", "ln_weight", "ln_bias")), 2),
        (PRE, 140, dict(frozen=("x", "w_down", "b_down", "ln_weight", "ln_bias")), 2),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_launches(case, n, options, launches):
    kwargs = arguments(case.inputs(dict(n=n, d=96, r=16, **options), torch.bfloat16))
    wanted = list({id(v): v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad}.values())
    with count_launches() as forward:
        y = case.fn(**kwargs, impl="triton")
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert (forward.total(), backward.total()) == (1, launches), (forward, backward)


@interpreted
@pytest.mark.parametrize(
    ("size", "dtype", "forward", "backward"),
    [((64, 768, 64), torch.bfloat16, 3.1, 8.2), ((64, 768, 16), torch.bfloat16, 3.03, 7.25)],
    ids=["r64", "r16"],
)
def test_bytes_requested(size, dtype, forward, backward, monkeypatch):
    """Passes over N x d, parameters, their gradients and partial sums apart.

    Forward 3 is the least: x and residual read, y written. Backward: 4 to the gradient of the sum (g, x and
    residual read, du written), 3 to dx and the weights' gradients (du and x read, dx written); the rest is z and dz.
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
    assert traffic.within(dx) == traffic.within(residual) == traffic.within(g) == unit
    assert traffic.within(du) == traffic.within(x) == 2 * unit
    print(f"{size}: forward {passes_forward:.3f}, backward {passes_backward:.3f}")
    assert 3 <= passes_forward <= forward and 7 <= passes_backward <= backward


@interpreted
@pytest.mark.parametrize(("size", "forward", "backward"), [((64, 768, 64), 2.1, 5.25)], ids=["r64"])
def test_bytes_requested_of_norm_adapter(size, forward, backward, monkeypatch):
    """Forward 2 is the least: x read, y written. Backward: g to dz; g and x to dx; the rest z and dz."""
    call = PRE.inputs(dict(n=size[0], d=size[1], r=size[2]), torch.bfloat16)
    names = ("x", "ln_weight", "ln_bias", "w_down", "b_down", "w_up", "b_up")
    x, *weights = (call[name].detach() for name in names)
    unit, g = x.numel() * x.element_size(), torch.randn_like(x)
    targets: list[torch.Tensor] = []
    made = pre_norm.workspace
    monkeypatch.setattr(pre_norm, "workspace", lambda *a: targets.extend(made(*a)) or tuple(targets))
    with count_bytes() as traffic:
        y, *kept = pre_norm.forward(x, *weights, x, None, 1.0, "gelu", "layer", 1e-5, True)
    passes_forward = (traffic.total - traffic.within(*weights)) / unit
    assert traffic.within(y) == traffic.within(x) == unit
    with count_bytes() as traffic:
        needs = (True,) * 7 + (False,)
        dx, *grads = pre_norm.backward(g, x, *kept, *weights, None, 1.0, "gelu", "layer", True, needs)
    parts = [t for t in (*targets, *grads) if t.numel()]
    passes_backward = (traffic.total - traffic.within(*weights, *parts)) / unit
    assert traffic.within(dx) == traffic.within(x) == unit and traffic.within(g) == 2 * unit
    print(f"{size}: forward {passes_forward:.3f}, backward {passes_backward:.3f}")
    assert 2 <= passes_forward <= forward and 4 <= passes_backward <= backward


@interpreted
@BOTH
def test_deterministic(case):
    call = case.inputs(dict(n=300, d=96, r=16, scale=("d_out",)), torch.bfloat16)
    first, second = (run(case.fn, call, impl="triton") for _ in range(2))
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


@BOTH
def test_unsupported_calls_say_why(case):
    call = arguments(case.inputs(dict(n=2, d=8, r=129)))
    with pytest.raises(RuntimeError, match="bottleneck is at most 128 wide, got r = 129"):
        case.fn(**call, impl="triton")


@interpreted
@BOTH
@pytest.mark.parametrize(
    "sample",
    [
        dict(n=5, d=1100, r=100, norm="rms"),
        dict(n=5, d=2100, r=20, activation="softmax"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_too_wide_to_hold(case, sample, dtype):
    """And the softmax, whose derivative takes the whole of a row of the bottleneck."""
    assert check(case, case.inputs(sample, dtype, torch.float32), impl="triton") == []
