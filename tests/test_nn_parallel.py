"""The adapters that are `BottleneckAdapter` with other defaults, at other places or with randomness in training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petl_kernels.nn import AdapterPlus, AdaptFormer, BottleneckAdapter, LowRankPAL, ParallelAdapter, PfeifferAdapter
from petl_kernels.ops._dropout import keep, new_seed

D, R = 20, 6
DEFAULTS = {
    ParallelAdapter: dict(bottleneck=512, scale=4.0, activation="relu", init="lora", form="parallel", dropout=0.0),
    AdaptFormer: dict(bottleneck=64, scale=0.1, activation="relu", init="lora", form="parallel", dropout=0.1),
    LowRankPAL: dict(bottleneck=100, scale=1.0, activation="gelu", init="bert", form="parallel", dropout=0.0),
    PfeifferAdapter: dict(scale=1.0, activation="relu", init="bert", form="parallel", dropout=0.0),
    AdapterPlus: dict(bottleneck=8, activation="gelu", init="houlsby", form="sequential", drop_path=0.1),
}


def x(seed=0, dtype=torch.float64):
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind, **options):
    torch.manual_seed(0)
    module = kind(D, R, dtype=torch.float64, **options)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def branch(module, value, act):
    return module.scale * (act(value @ module.w_down.T + module.b_down) @ module.w_up.T + module.b_up)


def leaves_of(module, *values):
    return [*values, *module.parameters()]


def same_with_gradients(got, expected, leaves):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    g = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind, defaults", DEFAULTS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_published_defaults(kind, defaults):
    module = kind(D) if "bottleneck" in defaults else kind(D, R)
    assert {name: getattr(module, name) for name in defaults} == defaults
    if kind is AdapterPlus:
        assert torch.equal(module.scale, torch.ones(D))
    assert f"{kind.__name__}(" in repr(module)


@pytest.mark.parametrize("scale", [4.0, "learned", "channel"])
def test_parallel(scale):
    module, value, residual = make(ParallelAdapter, scale=scale), x().requires_grad_(), x(1).requires_grad_()
    leaves = leaves_of(module, value, residual)
    same_with_gradients(module(value, residual), residual + branch(module, value, F.relu), leaves)
    same_with_gradients(module(value), branch(module, value, F.relu), leaves_of(module, value))


def test_adaptformer_and_low_rank_pal():
    for kind, act in ((AdaptFormer, F.relu), (LowRankPAL, F.gelu)):
        module, value, residual = make(kind).eval(), x().requires_grad_(), x(1).requires_grad_()
        leaves = leaves_of(module, value, residual)
        same_with_gradients(module(value, residual), residual + branch(module, value, act), leaves)


def test_pfeiffer_applies_the_norm_twice():
    module, h, value = make(PfeifferAdapter), x().requires_grad_(), x(1).requires_grad_()
    norm = nn.LayerNorm(D, dtype=torch.float64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    expected = norm(h + branch(module, norm(h + value), F.relu) + value)
    same_with_gradients(module(h, value, norm), expected, [*leaves_of(module, h, value), *norm.parameters()])


def test_adapter_plus_without_randomness_is_one_call():
    for module in (make(AdapterPlus).eval(), make(AdapterPlus, drop_path=0.0)):
        value = x().requires_grad_()
        same_with_gradients(module(value), value + branch(module, value, F.gelu), leaves_of(module, value))
    with pytest.raises(ValueError, match="residual must be None in the sequential form"):
        make(AdapterPlus)(x(), x())


def test_adapter_plus_leaves_out_whole_samples():
    module, value = make(AdapterPlus, drop_path=0.25), x()[:, :1].repeat(500, 1, 1)
    torch.manual_seed(0)
    change = module(value) - value
    full = branch(module, value, F.gelu)
    kept = change.flatten(1).abs().sum(1) > 0
    torch.testing.assert_close(change[kept], full[kept] / 0.75, rtol=1e-11, atol=1e-11)
    assert abs(kept.double().mean().item() - 0.75) < 0.05  # 2000 samples: a standard deviation is 0.01
    module(value).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("scale", [2.0, "learned"])
def test_dropout_on_the_bottleneck(scale, impl):
    module = make(BottleneckAdapter, activation="silu", scale=scale, dropout=0.4, impl=impl)
    value = x().requires_grad_()
    torch.manual_seed(5)
    got = module(value)
    torch.manual_seed(5)
    hidden = F.silu(value @ module.w_down.T + module.b_down)
    if impl == "reference":
        hidden = F.dropout(hidden, 0.4)
    else:
        hidden = hidden * keep(new_seed(value.device), 20, R, 0.4).view(4, 5, R) / 0.6
    expected = value + module.scale * (hidden @ module.w_up.T + module.b_up)
    same_with_gradients(got, expected, leaves_of(module, value))
    module.eval()
    same_with_gradients(module(value), value + branch(module, value, F.silu), leaves_of(module, value))
    assert "dropout=0.4" in repr(module) and repr(eval(repr(module))) == repr(module)


def test_dropout_beside_low_precision():
    module = BottleneckAdapter(D, R, dropout=0.4)  # float32 beside bfloat16 activations
    assert module(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x(dtype=torch.float32)).dtype == torch.float32  # the residual's, as without dropout
        assert module.eval()(x(dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("kind", DEFAULTS)
def test_copies(kind):
    module = make(kind).eval()
    args = (x(), x(1), nn.Identity()) if kind is PfeifferAdapter else (x(),)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is kind and torch.equal(other(*args), module(*args))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (
            BottleneckAdapter,
            dict(dropout=1.0),
            r"BottleneckAdapter: dropout must be a probability in \[0, 1\), got 1\.0",
        ),
        (AdaptFormer, dict(dropout=True), r"BottleneckAdapter: dropout must be a probability in \[0, 1\), got True"),
        (AdapterPlus, dict(drop_path=-0.1), r"AdapterPlus: drop_path must be a probability in \[0, 1\), got -0\.1"),
        (ParallelAdapter, dict(scale="row"), "scale must be a float or one of"),
    ],
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(D, R, **options)
