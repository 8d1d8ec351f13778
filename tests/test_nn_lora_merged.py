"""`petl_kernels.nn.LoRAMergedLinear`: a frozen fused projection and low-rank branches on slices of its output."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import petl_kernels
from petl_kernels.nn import LoRAMergedLinear
from petl_kernels.profiling import count_launches
from petl_kernels.testing import Outcome, judge

IN, OUT = 24, 40
SLICES = {"query, value": ((0, 16), (24, 40)), "all, uneven": ((0, 20), (20, 30), (30, 40)), "one": ((7, 9),)}
QV = SLICES["query, value"]


def linear(dtype=torch.float32, bias=True, kind=nn.Linear):
    torch.manual_seed(0)
    return (nn.Linear(IN, OUT, bias=bias) if kind is nn.Linear else Conv1D(OUT, IN)).to(dtype)


def trained(of=torch.float32, rank=5, slices=QV, base=None, **options):
    module = LoRAMergedLinear.from_linear(base or linear(of), rank, slices, **options)
    nn.init.normal_(module.w_up, std=0.2)
    return module


def x(seed=0, dtype=torch.float32, shape=(3, 7)):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(module, value, dropped=None):
    """The usual code: the branches added to slices of the dense product."""
    weight = module.weight.T if module.fan_in_fan_out else module.weight
    y, into = F.linear(value, weight, module.bias), value if dropped is None else dropped
    row = 0
    for i, (start, stop) in enumerate(module.slices):
        down = module.w_down[i * module.rank : (i + 1) * module.rank].to(value.dtype)
        up = module.w_up[row : row + stop - start].to(value.dtype)
        y[..., start:stop] += module.alpha / module.rank * (into @ down.T) @ up.T
        row += stop - start
    return y


def gradients(y, leaves):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("kind, bias", [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_the_formula_and_its_gradients(impl, slices, kind, bias):
    module = trained(torch.float64, 3, slices, linear(torch.float64, bias, kind), alpha=2.0, impl=impl)
    for value in (
        x(dtype=torch.float64),
        x(dtype=torch.float64, shape=(0,)),
        x(dtype=torch.float64, shape=(4, 2)).mT.mT,
    ):
        leaves = [value.requires_grad_(), module.w_down, module.w_up]
        got, expected = module(value), formula(module, value)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(got, leaves), gradients(expected, leaves)):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (expanded,) = torch.autograd.grad(module(value).sum(), [module.w_down])
    torch.testing.assert_close(expanded, torch.autograd.grad(formula(module, value).sum(), [module.w_down])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, None])
def test_no_less_accurate_than_eager(dtype, own):
    module, value = trained(dtype, dtype=own), x(dtype=dtype).requires_grad_()

    def outcome(run, dtype):
        other = copy.deepcopy(module).to(dtype) if dtype is not None else module
        leaves = [value.detach().to(dtype or value.dtype).requires_grad_(), other.w_down, other.w_up]
        y = run(other, leaves[0])
        return Outcome(y.detach(), dict(zip(("x", "w_down", "w_up"), gradients(y, leaves))))

    ours = outcome(lambda m, v: m(v), None)
    assert [g.dtype for g in ours.grads.values()] == [dtype, module.w_down.dtype, module.w_up.dtype]
    assert judge(ours, outcome(formula, None), outcome(formula, torch.float64)) == []


@pytest.mark.parametrize("frozen", ["x", "w_down", "w_up", "x w_down", "w_down w_up", "x w_up"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_frozen_subsets(frozen, dropout):
    module, value = trained(torch.float64, dropout=dropout), x(dtype=torch.float64)
    named = {"x": value, "w_down": module.w_down, "w_up": module.w_up}
    leaves = [t.requires_grad_(name not in frozen.split()) for name, t in named.items()]
    leaves = [t for t in leaves if t.requires_grad]
    torch.manual_seed(3)
    got = gradients(module(value), leaves)
    torch.manual_seed(3)
    expected = gradients(formula(module, value, F.dropout(value, dropout)), leaves)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_bias_and_a_weight_that_train_again():
    module, value = trained(torch.float64), x(dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (module.weight, module.bias, module.w_down, module.w_up)]
    for ours, theirs in zip(gradients(module(value), leaves), gradients(formula(module, value), leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_launches():
    module = trained()
    value = x().requires_grad_()
    forward = count_launches(lambda: module(value)).total()
    y = module(value)
    backward = count_launches(lambda: torch.autograd.grad(y, [value, module.w_down, module.w_up], y)).total()
    assert (forward, backward) == (4, 7)


def test_starts_as_the_linear_and_keeps_its_names():
    base = linear()
    before, weight, bias = base(x()), base.weight, base.bias
    module = LoRAMergedLinear.from_linear(base, 4, [(24, 40), (0, 16)])
    assert torch.equal(module(x()), before) and module.weight is weight and module.bias is bias
    assert module.slices == QV and module.w_down.shape == (8, IN) and module.w_up.shape == (32, 4)
    assert set(module.state_dict()) == {"weight", "bias", "w_down", "w_up"}
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["w_down", "w_up"]
    module(x()).sum().backward()
    assert weight.grad is None and bias.grad is None and module.w_up.grad.abs().sum() > 0
    assert torch.equal(module(x())[..., 16:24], before[..., 16:24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_merge(dtype, kind):
    module = trained(dtype, base=linear(dtype, kind=kind), alpha=7.0)
    exact = (module.weight.T if kind is Conv1D else module.weight).double().clone()
    exact[:16] += 1.4 * module.w_up[:16].double() @ module.w_down[:5].double()
    exact[24:] += 1.4 * module.w_up[16:].double() @ module.w_down[5:].double()
    merged = module.merge()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, exact.to(dtype))
    assert torch.equal(merged.bias, module.bias) and merged.bias is not module.bias
    assert not merged.weight.requires_grad and not merged.bias.requires_grad
    assert torch.equal(module.weight, linear(dtype, kind=kind).weight)  # the layer stays: putting it back unmerges


def test_copies_and_meta():
    module = trained()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = LoRAMergedLinear.from_linear(linear(), 5, QV)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x()), module(x()))
    deferred = LoRAMergedLinear.from_linear(nn.Linear(IN, OUT, device="meta"), 3, QV)
    assert deferred.w_down.is_meta and deferred(torch.empty(2, IN, device="meta")).shape == (2, OUT)


def test_compiled_whole_and_under_autocast():
    torch._dynamo.reset()
    module, value = trained(), x().requires_grad_()
    leaves = [value, module.w_down, module.w_up]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value), module(value))
    torch.testing.assert_close(gradients(compiled(value), leaves), gradients(module(value), leaves))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(value)
        assert y.dtype == torch.bfloat16
    grads = gradients(y, leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    for ours, exact in zip(grads, gradients(formula(module, value), leaves)):
        assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


def test_transforms_take_the_reference_and_a_second_differentiation_is_refused():
    module, value = trained(torch.float64), x(dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(torch.func.vmap(module)(value), module(value))
    tangent = torch.func.jvp(module, (value,), (value,))[1]
    torch.testing.assert_close(tangent, module(value) - module(torch.zeros_like(value)))
    (dx,) = torch.autograd.grad(module(value).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="LoRAMergedLinear: double backward is not implemented"):
        dx.sum().backward()
    with petl_kernels.use_impl("reference"):
        (dx,) = torch.autograd.grad(module(value).square().sum(), value, create_graph=True)
    dx.sum().backward()
    assert module.w_up.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "base, options, error, message",
    [
        (nn.Conv1d(2, 2, 1), {}, TypeError, "linear must be an nn.Linear, got Conv1d"),
        (nn.Linear(2, 2), dict(rank=0), ValueError, "rank must be an integer of at least 1, got 0"),
        (nn.Linear(2, 2), dict(slices=()), ValueError, r"slices must be pairs 0 <= start < stop <= 2 .*, got \(\)"),
        (nn.Linear(2, 2), dict(slices=[(0, 3)]), ValueError, r"slices must be pairs .*, got \[\(0, 3\)\]"),
        (nn.Linear(2, 2), dict(slices=[(0, 2), (1, 2)]), ValueError, "that do not overlap"),
        (nn.Linear(2, 2), dict(slices=[(0, 1.0)]), ValueError, "of integers"),
        (nn.Linear(2, 2), dict(slices="qv"), ValueError, "slices must be pairs"),
        (nn.Linear(2, 2), dict(alpha="x"), ValueError, "alpha must be None or a float, got 'x'"),
        (nn.Linear(2, 2), dict(dropout=1.0), ValueError, r"dropout must be a probability in \[0, 1\), got 1\.0"),
        (nn.Linear(2, 2), dict(impl="cpp"), ValueError, "impl must be one of .*, got 'cpp'"),
    ],
)
def test_bad_arguments_change_nothing(base, options, error, message):
    with pytest.raises(error, match=f"^LoRAMergedLinear: .*{message}"):
        LoRAMergedLinear.from_linear(base, **{"rank": 2, "slices": [(0, 1)], **options})
    assert all(p.requires_grad for p in base.parameters())
