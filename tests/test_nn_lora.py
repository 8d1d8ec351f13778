"""`petl_kernels.nn.LoRALinear`: a frozen linear and its low-rank branch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from table import impls
from torch import nn

from petl_kernels.nn import LoRALinear
from petl_kernels.testing import CASES, Outcome, judge

IN, OUT = 24, 40
IMPLS = impls(next(case for case in CASES if case.name == "bottleneck_adapter"))


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def trained(dtype=torch.float32, rank=5, **options):
    module = LoRALinear.from_linear(linear(dtype), rank, **options)
    nn.init.normal_(module.w_up, std=0.2)
    return module


def x(seed=0, dtype=torch.float32):
    return torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_the_formula_and_its_gradients(impl, rank):
    module = trained(torch.float64, rank, alpha=3.0, impl=impl)
    value = x(dtype=torch.float64).requires_grad_()
    leaves = [value, module.w_down, module.w_up]
    expected = value @ module.weight.T + module.bias + 3.0 / rank * (value @ module.w_down.T) @ module.w_up.T
    got = module(value)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    g = x(1, torch.float64).new_ones(got.shape).cumsum(-1)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, None])
def test_no_less_accurate_than_eager(dtype, own):
    module = LoRALinear.from_linear(linear(dtype), 5, dtype=own)
    nn.init.normal_(module.w_up, std=0.2)
    value = x(dtype=dtype)

    def of(dtype):
        w, b, down, up, v = (
            t.detach().to(dtype) for t in (module.weight, module.bias, module.w_down, module.w_up, value)
        )
        return Outcome(v @ w.T + b + module.scale * (v @ down.T) @ up.T)

    assert judge(Outcome(module(value).detach()), of(dtype), of(torch.float64)) == []


def test_starts_as_the_linear_and_keeps_its_names():
    base = linear()
    before, weight, bias = base(x()), base.weight, base.bias
    module = LoRALinear.from_linear(base, 4)
    assert torch.equal(module(x()), before) and module.weight is weight and module.bias is bias
    assert set(module.state_dict()) == {"weight", "bias", "w_down", "w_up"}
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["w_down", "w_up"]
    assert module.scale == 1.0 and LoRALinear.from_linear(linear(), 4, alpha=8).scale == 2.0
    module(x()).sum().backward()
    assert weight.grad is None and bias.grad is None and module.w_up.grad.abs().sum() > 0
    assert set(LoRALinear.from_linear(linear(bias=False), 4).state_dict()) == {"weight", "w_down", "w_up"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype):
    module = trained(dtype, alpha=7.0)
    merged = module.merge()
    exact = module.weight.double() + 1.4 * module.w_up.double() @ module.w_down.double()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, exact.to(dtype))
    assert torch.equal(merged.bias, module.bias) and merged.bias is not module.bias
    assert not merged.weight.requires_grad and not merged.bias.requires_grad
    assert torch.equal(module.weight, linear(dtype).weight)  # the layer stays: putting it back unmerges


def test_dropout_acts_on_the_branch_in_training_only():
    module = trained(dropout=0.5)
    plain = nn.functional.linear(x(), module.weight, module.bias)
    torch.manual_seed(0)
    branches = torch.stack([module(x()) - plain for _ in range(100)])
    module.eval()
    expected = module(x()) - plain
    assert torch.equal(module(x()) - plain, expected) and not torch.equal(branches[0], branches[1])
    spread = branches.std(0) / 10  # of a mean of 100
    assert ((branches.mean(0) - expected).abs() < 6 * spread + 1e-6).all()


def test_copies_and_meta():
    module = trained()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = LoRALinear.from_linear(linear(), 5)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x()), module(x()))
    deferred = LoRALinear.from_linear(nn.Linear(IN, OUT, device="meta"), 3)
    assert deferred.w_down.is_meta and deferred(torch.empty(2, IN, device="meta")).shape == (2, OUT)


def test_compiled_whole_and_under_autocast():
    torch._dynamo.reset()
    module = trained()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x()), module(x()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x()).dtype == torch.bfloat16


class _Other(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize(
    "base, options, error, message",
    [
        (nn.Conv1d(2, 2, 1), {}, TypeError, "linear must be an nn.Linear, got Conv1d"),
        (_Other(2, 2), {}, TypeError, "_Other has a forward of its own"),
        (nn.Linear(2, 2), dict(rank=0), ValueError, "rank must be an integer of at least 1, got 0"),
        (nn.Linear(2, 2), dict(rank=2.0), ValueError, r"rank must be an integer of at least 1, got 2\.0"),
        (nn.Linear(2, 2), dict(alpha="x"), ValueError, "alpha must be None or a float, got 'x'"),
        (nn.Linear(2, 2), dict(dropout=1.0), ValueError, r"dropout must be a probability in \[0, 1\), got 1\.0"),
        (nn.Linear(2, 2), dict(impl="fast"), ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_bad_arguments_change_nothing(base, options, error, message):
    with pytest.raises(error, match=f"^LoRALinear: .*{message}"):
        LoRALinear.from_linear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())
