"""The Triton kernels of `channel_adapter` without a GPU: launches, bytes, determinism, wide strides, infinities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import petl_kernels
from petl_kernels.testing import CASES, arguments, check, run

pytest.importorskip("triton")

from table import long_if
from triton_interpreter import count_bytes, count_launches, far_apart, interpreted, recorded_targets

from petl_kernels.ops import _triton
from petl_kernels.ops.channel_adapter import triton as implementation

CASE = next(case for case in CASES if case.name == "channel_adapter")


def inputs(n: int, d: int, k: int, dtype: torch.dtype = torch.bfloat16, **options: object) -> dict:
    return CASE.inputs(dict(n=n, d=d, k=k, shuffled=True, **options), dtype)


@interpreted
@pytest.mark.parametrize(
    ("n", "options", "launches"),
    [
        (32, {}, 1),
        (600, {}, 2),
        (32, dict(scale=(1,)), 1),
        (600, dict(scale=(), scale_input=True), 2),
        (600, dict(scale=(1,), frozen=("weight", "bias", "scale")), 1),
        (600, dict(frozen=("x",)), 2),
    ],
    ids=["one-group", "groups", "one-group-scale", "groups-scale", "only-x", "frozen-x"],
)
def test_launches(n, options, launches):
    kwargs = arguments(inputs(n, 96, 16, **options))
    wanted = [v for v in kwargs.values() if isinstance(v, Tensor) and v.requires_grad]
    petl_kernels.channel_adapter(**kwargs, impl="triton")  # the channels' values are read once
    with count_launches() as forward:
        y = petl_kernels.channel_adapter(**kwargs, impl="triton")
    assert forward.total() == 1, forward
    g = torch.ones_like(y)
    with count_launches() as backward:
        torch.autograd.grad(y, wanted, g)
    assert backward.total() == launches, backward


@interpreted
@pytest.mark.parametrize(
    ("size", "forward", "backward"),
    # Above 128 channels the columns of a tile are gathered once per tile of the product, then from the L1 cache.
    [((512, 768, 96), 1.001, 1.06), ((512, 1024, 32), 1.001, 1.02), ((512, 768, 192), 1.35, 1.75)],
    ids=["512x768x96", "512x1024x32", "512x768x192"],
)
def test_bytes_requested(size, forward, backward, monkeypatch):
    """Over the ideal, parameters, channels, gradients and their shares apart.

    Ideal is x read, y and x_C written; then g and x_C read and dx written.
    """
    call = inputs(*size)
    x, channels, weight, bias = (call[name].detach() for name in ("x", "channels", "weight", "bias"))
    g = torch.randn_like(x)
    parameters, targets = (channels, weight, bias), recorded_targets(monkeypatch, implementation)
    with count_bytes() as traffic:
        y, x_channels = implementation.forward(x, channels, weight, bias, None, 1.0, False, True)
    ideal = sum(t.numel() * t.element_size() for t in (x, y, x_channels))
    over_forward = (traffic.total - traffic.within(*parameters)) / ideal
    assert traffic.within(y) == y.numel() * y.element_size() and traffic.within(x) >= x.numel() * x.element_size()
    with count_bytes() as traffic:
        dx, *grads = implementation.backward(
            g, x_channels, channels, weight, bias, None, 1.0, False, (True, True, True, False)
        )
    over_backward = (traffic.total - traffic.within(*parameters, *targets, *grads)) / ideal
    assert traffic.within(dx) == dx.numel() * dx.element_size() and traffic.within(g) >= g.numel() * g.element_size()
    print(f"{size}: forward {over_forward:.3f}, backward {over_backward:.3f}")
    assert 1 <= over_forward <= forward and 1 <= over_backward <= backward


@interpreted
def test_rows_more_than_2_to_the_31_elements_apart():
    call = inputs(3, 32, 16, torch.float16)
    wide = far_apart(call["x"])
    near = run(petl_kernels.channel_adapter, call, impl="triton")
    far = run(petl_kernels.channel_adapter, {**call, "x": wide.requires_grad_()}, impl="triton")
    assert far.output.isfinite().all()
    for (name, a), (_, b) in zip(near.items(), far.items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():  # and a gradient with such rows
        g, parameters = call["x"].detach(), (call["channels"], call["weight"].detach(), call["bias"].detach())
        rest = (g[:, call["channels"]], *parameters, None, 1.0, False, (True, True, True, False))
        pairs = zip(implementation.backward(g, *rest), implementation.backward(wide, *rest))
        assert all(torch.equal(a, b) for a, b in pairs)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    call = inputs(600, 96, 16, dtype, scale=(1,))  # nine groups of rows
    first = run(petl_kernels.channel_adapter, call, impl="triton")
    second = run(petl_kernels.channel_adapter, call, impl="triton")
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


WIDE_AND_MANY = [
    dict(n=21, d=520, k=512, scale=(1,)),  # tiles, one group
    dict(n=400, d=60, k=40, scale=(1,), scale_input=True),  # in fp32 tiles and groups
    dict(n=1100, d=140, k=130),  # tiles and groups
    dict(n=2300, d=16, k=3, scale=()),  # groups of 64 rows
    dict(n=1200, d=140, k=130, frozen=("weight",)),  # no M, several tiles of sums
]


@interpreted
@pytest.mark.parametrize(
    "sample, dtype",
    long_if(
        [
            pytest.param(s, dtype, id=f"{dtype}-{s['n']}x{s['d']}x{s['k']}")
            for s in WIDE_AND_MANY
            for dtype in (torch.float32, torch.bfloat16)
        ],
        lambda sample, dtype: sample["k"] == 130 and dtype == torch.float32,
    ),
)
def test_wide_and_many(sample, dtype):
    assert check(CASE, CASE.inputs({**sample, "shuffled": True}, dtype, torch.float32), impl="triton") == []


@interpreted
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("where", ["chosen", "other"])
def test_infinities_and_nan_pass_as_in_eager(where, scale_input):
    """An infinity stays in its row and, of a channel that is not chosen, in its place: no tile's padding spreads it."""
    call = inputs(40, 24, 3, torch.float32, scale=0.5, scale_input=scale_input, bias=False)
    channels = call["channels"].tolist()
    column = channels[1] if where == "chosen" else next(c for c in range(24) if c not in channels)
    x = call["x"].detach().clone()
    x[3, column], x[17, column], x[39, column] = torch.inf, -torch.inf, torch.nan
    weight = call["weight"].detach().abs()  # no inf - inf
    results = []
    for impl in ("triton", "reference"):
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        y = petl_kernels.channel_adapter(leaves[0], call["channels"], leaves[1], None, scale=0.5, impl=impl)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, x)))  # the gradient has them too
    for ours, eager in zip(*results):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_unsupported_calls_say_why():
    x = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.channel_adapter(x, torch.arange(3), x.new_ones(3, 3), None, impl="triton")
    with pytest.raises(RuntimeError, match="at most 512 channels, got k = 513"):
        petl_kernels.channel_adapter(torch.ones(2, 600), torch.arange(513), torch.ones(513, 513), None, impl="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on a GPU, got cpu"):
        petl_kernels.channel_adapter(torch.ones(2, 4), torch.arange(3), torch.ones(3, 3), None, impl="triton")
