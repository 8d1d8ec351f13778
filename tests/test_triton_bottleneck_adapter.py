"""The Triton kernels of `bottleneck_adapter` without a GPU: launches, bytes, determinism, wide strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import petl_kernels
from petl_kernels.testing import CASES, check, run

triton = pytest.importorskip("triton")
tl = triton.language

from triton_interpreter import (  # noqa: E402
    count_bytes,
    count_launches,
    far_apart,
    interpreted,
    narrow,
    recorded_targets,
    widen,
)

from petl_kernels.ops import _triton  # noqa: E402
from petl_kernels.ops.bottleneck_adapter import triton as implementation  # noqa: E402

PLAIN = (None, None, None, 0.0, 1.0)  # scale, gate, seed, dropout, alpha
CASE = next(case for case in CASES if case.name == "bottleneck_adapter")


def inputs(n: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16, **options: object) -> dict:
    return CASE.inputs(dict(n=n, d=d, r=r, **options), dtype)


@interpreted
@pytest.mark.parametrize(
    ("n", "options", "launches"),
    [
        (32, {}, 2),
        (600, {}, 3),
        (32, dict(scale=("d_out",)), 2),
        (32, dict(scale=(1,)), 3),
        (600, dict(scale=()), 3),
        (32, dict(gate=1, dropout=0.1, activation="softmax"), 2),
    ],
    ids=["one-group", "groups", "one-group-channel-scale", "one-group-scalar-scale", "groups-scalar-scale", "modified"],
)
def test_launches(n, options, launches):
    call = inputs(n, 96, 16, **options)
    kwargs = {k: v for k, v in call.items() if k != "grad_layout"}
    wanted = list({id(v): v for v in kwargs.values() if isinstance(v, Tensor) and v.requires_grad}.values())
    with count_launches() as forward:
        y = petl_kernels.bottleneck_adapter(**kwargs, impl="triton")
    assert forward.total() == 1, forward
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert backward.total() == launches, backward


@interpreted
@pytest.mark.parametrize(
    ("size", "forward", "backward"),
    # Of a row of 4096 a quarter fits the registers: the forward reads the rest twice, then from the L2 cache.
    [((256, 768, 64), 2.1, 5.2), ((256, 1024, 16), 2.05, 4.2), ((64, 4096, 64), 2.8, 5.05)],
    ids=["256x768x64", "256x1024x16", "64x4096x64"],
)
def test_bytes_requested(size, forward, backward, monkeypatch):
    """Passes over N x d, parameters, their gradients and partial sums apart; ideally 2 forward and 3 backward."""
    call = inputs(*size)
    x, *weights = (call[name].detach() for name in ("x", "w_down", "b_down", "w_up", "b_up"))
    g = torch.randn_like(x)
    targets = recorded_targets(monkeypatch, implementation)
    unit = x.numel() * x.element_size()
    with count_bytes() as traffic:
        y, z = implementation.forward(x, *weights, x, *PLAIN, "gelu", True)
    passes_forward = (traffic.total - traffic.within(*weights)) / unit
    assert traffic.within(y) == unit and traffic.within(x) >= unit
    with count_bytes() as traffic:
        dx, *grads = implementation.backward(g, x, z, *weights, *PLAIN, "gelu", True, (True,) * 5 + (False, False))
    passes_backward = (traffic.total - traffic.within(*weights, *targets, *grads)) / unit
    assert traffic.within(dx) == unit and traffic.within(g) >= unit
    print(f"{size}: forward {passes_forward:.3f}, backward {passes_backward:.3f}")
    assert 2 <= passes_forward <= forward and 3 <= passes_backward <= backward


@interpreted
def test_interpreter_multiplies_bf16():
    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        offsets = i[:, None] * SIZE + i[None, :]
        c = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
        tl.store(c_ptr + offsets, c)

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    exact, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    product[(1,)](a, b, exact, SIZE=16)
    product[(1,)](a, b, rounded, SIZE=16)
    wanted = a.double() @ b.double()
    assert (exact - wanted).abs().max() < 1e-5
    assert torch.equal(rounded, exact.bfloat16())  # the store rounds to nearest, as a GPU does
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1.00390625, 1.01171875, 3.4e38, 1e-40], np.float32)
    assert np.array_equal(widen(narrow(special)), torch.from_numpy(special).bfloat16().float().numpy())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()


@interpreted
def test_rows_more_than_2_to_the_31_elements_apart():
    call = inputs(3, 32, 16, torch.float16)
    wide = far_apart(call["x"])
    near = run(petl_kernels.bottleneck_adapter, call, impl="triton")
    wide.requires_grad_()
    far = run(petl_kernels.bottleneck_adapter, {**call, "x": wide, "residual": wide}, impl="triton")
    assert far.output.isfinite().all()
    for (name, a), (_, b) in zip(near.items(), far.items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():  # and a gradient with such rows
        weights = tuple(call[name].detach() for name in ("w_down", "b_down", "w_up", "b_up"))
        x = call["x"].detach()
        z = implementation.forward(x, *weights, x, *PLAIN, "gelu", True)[1]
        arguments = (x, z, *weights, *PLAIN, "gelu", True, (True,) * 5 + (False, False))
        pairs = zip(implementation.backward(x, *arguments), implementation.backward(wide, *arguments))
        assert all(torch.equal(a, b) for a, b in pairs)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    call = inputs(600, 96, 16, dtype, scale=("d_out",))  # nine groups of rows
    first = run(petl_kernels.bottleneck_adapter, call, impl="triton")
    second = run(petl_kernels.bottleneck_adapter, call, impl="triton")
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


@interpreted
@pytest.mark.parametrize(
    "sample",
    [
        dict(n=21, d=40, r=512, scale=("d_out",)),  # chunks of ranks, one group
        dict(n=1100, d=24, r=130, scale=("d_out",)),  # chunks and groups
        dict(n=21, d=40, r=200, residual=None, d_out=72, scale=()),
        dict(n=2300, d=16, r=3),  # groups of 64 rows
        dict(n=70, d=1200, r=20),  # too wide to hold
        dict(n=1100, d=24, r=130, activation="softmax", dropout=0.2, gate=1, scale=("d_out",)),
    ],
    ids=lambda s: f"{s['n']}x{s['d']}x{s['r']}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_and_many(sample, dtype):
    assert check(CASE, CASE.inputs(sample, dtype, torch.float32), impl="triton") == []


@interpreted
@pytest.mark.parametrize("activation", sorted(["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu"]))
def test_infinities_and_nan_pass_as_in_eager(activation):
    values = torch.tensor([float("nan"), float("-inf"), float("inf"), 200.0, -200.0, 1e-6, -0.3, 0.0])
    if activation == "gelu":
        values[2] = 0.3  # PyTorch on CPUs says gelu(inf) is NaN; the kernel, and PyTorch on GPUs, say inf
    x = values[:, None].clone().requires_grad_()
    one = torch.ones(1, 1)
    results = []
    for impl in ("triton", "reference"):
        y = petl_kernels.bottleneck_adapter(x, one, None, one, None, activation=activation, impl=impl)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    for ours, eager in zip(*results):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_unsupported_calls_say_why():
    x, w = torch.ones(2, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.bottleneck_adapter(x, w, None, w.T, None, impl="triton")
    x, w = torch.ones(2, 4), torch.ones(513, 4)
    with pytest.raises(RuntimeError, match="at most 512"):
        petl_kernels.bottleneck_adapter(x, w, None, w.T, None, impl="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="on a GPU, got cpu"):
        petl_kernels.bottleneck_adapter(x, w, None, w.T, None, impl="triton")
