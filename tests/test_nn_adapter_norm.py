"""`nn.AdapterNorm` and `nn.NormAdapter`: the same function as adapter and norm apart, with norms made or given."""

from __future__ import annotations

import pytest
import torch
from table import Recorder

from petl_kernels import nn, use_impl

D, R = 12, 3


def build(layer, **options):
    torch.manual_seed(0)
    module = layer(D, R, init="bert", **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def two_step(module, x, residual):
    """What the module stands for, in PyTorch's own operators and modules."""
    adapter = nn.BottleneckAdapter(
        D, R, scale=module.scale if isinstance(module.scale, float) else "channel", form="parallel"
    )
    own = {name: p for name, p in module.named_parameters() if not name.startswith("norm.")}
    with use_impl("reference"):
        if isinstance(module, nn.AdapterNorm):
            y = torch.func.functional_call(adapter, own, (x, x))
            return module.norm(y if residual is None else y + residual)
        if module.form == "sequential":
            residual = x
        return torch.func.functional_call(adapter, own, (module.norm(x), residual))


@pytest.mark.parametrize("norm", ["layer", "rms", "given"])
@pytest.mark.parametrize(
    "layer, options, with_residual",
    [
        (nn.AdapterNorm, {}, True),
        (nn.AdapterNorm, dict(scale="channel"), False),
        (nn.NormAdapter, {}, False),
        (nn.NormAdapter, dict(form="parallel", scale=2.0), True),
    ],
    ids=["post", "post-alone", "pre", "pre-parallel"],
)
def test_one_call_of_the_op_computes_adapter_and_norm(layer, options, with_residual, norm):
    given = torch.nn.RMSNorm(D) if norm == "given" else norm  # whose eps is None: that of its dtype
    module = build(layer, norm=given, **options)
    x, residual = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D) if with_residual else None
    with Recorder() as recorder, use_impl("cpp"):
        y = module(x, residual)
    names = {made[0].name() for made in recorder.calls}
    assert names == {f"petl_kernels::{'adapter_norm' if layer is nn.AdapterNorm else 'norm_adapter'}_fwd"}
    wanted = two_step(module, x, residual)
    torch.testing.assert_close(y, wanted)
    leaves = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.AdapterNorm, nn.NormAdapter])
def test_dropout_leaves_the_norm_to_itself_while_it_is_at_work(layer):
    module = build(layer, dropout=0.5)
    x = torch.randn(4, D)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(2)
    assert not torch.equal(first, module(x))
    module.eval()
    torch.testing.assert_close(module(x), two_step(module, x, None))


@pytest.mark.parametrize("layer", [nn.AdapterNorm, nn.NormAdapter])
def test_a_norm_that_does_not_fit_is_refused(layer):
    for norm in (torch.nn.LayerNorm(D + 1), torch.nn.BatchNorm1d(D), "batch"):
        with pytest.raises(ValueError, match=f"{layer.__name__}: norm must be"):
            layer(D, R, norm=norm)
