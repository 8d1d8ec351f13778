"""`petl_kernels.nn.ChannelAdapter`: the op with parameters, merging, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from table import impls
from torch import nn

from petl_kernels import channel_adapter
from petl_kernels.nn import ChannelAdapter
from petl_kernels.testing import CASES

D = 48
CHANNELS = (30, 2, 47, 11, 0, 25)
IMPLS = impls(next(case for case in CASES if case.name == "channel_adapter"))


def x(seed=0, **kwargs):
    return torch.randn(5, D, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def trained(**options):
    """A module whose parameters are far from where they start."""
    module = ChannelAdapter(D, CHANNELS, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + 0.2)
    return module


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
@pytest.mark.parametrize("scale", [0.4, "learned"])
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_op(impl, scale, scale_input, bias):
    module = trained(scale=scale, scale_input=scale_input, bias=bias, impl=impl)
    options = dict(scale=module.scale, scale_input=scale_input, impl=impl)
    got = module(x())
    assert torch.equal(got, channel_adapter(x(), torch.tensor(CHANNELS), module.weight, module.bias, **options))
    others = [c for c in range(D) if c not in CHANNELS]
    assert torch.equal(got[:, others], x()[:, others]) and not torch.equal(got, x())
    got.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_parameters_and_buffer():
    module = ChannelAdapter(D, torch.tensor(CHANNELS), scale="learned")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"weight": (6, 6), "bias": (6,), "scale": (1,)}
    assert module.channels.tolist() == list(CHANNELS) and not module.channels.requires_grad
    bare = ChannelAdapter(D, CHANNELS, bias=False)
    assert set(bare.state_dict()) == {"channels", "weight"} and bare.bias is None and bare.scale == 1.0
    assert bare.half().channels.dtype == torch.int64


@pytest.mark.parametrize("k, total", [(32, 12_672), (96, 111_744), (192, 444_672), (384, 1_774_080)])
def test_parameter_counts_of_sct_on_vit_b_16(k, total):
    """One module per block of ViT-B/16: SCT reports 0.11M parameters for K = 96 and 0.44M for K = 192."""
    modules = nn.ModuleList(ChannelAdapter(768, range(k)) for _ in range(12))
    assert sum(p.numel() for p in modules.parameters() if p.requires_grad) == total == 12 * (k * k + k)


def test_starts_as_sct_does():
    torch.manual_seed(0)
    module = ChannelAdapter(768, range(384))
    assert module.weight.std().item() == pytest.approx(0.02, rel=0.02) and module.weight.abs().max() > 0.06
    assert torch.count_nonzero(module.bias) == 0


def test_reset_and_meta_construction():
    torch.manual_seed(3)
    expected = ChannelAdapter(D, CHANNELS, scale="learned")
    deferred = ChannelAdapter(D, CHANNELS, scale="learned", device="meta")
    assert all(t.is_meta for t in (*deferred.parameters(), *deferred.buffers()))
    assert deferred(x(device="meta")).shape == (5, D)
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, p), (_, q) in zip(expected.state_dict().items(), deferred.state_dict().items()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("scale", [0.4, "learned"])
def test_copies(scale, tmp_path):
    module = trained(scale=scale)
    expected = module(x())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded, from_file = (ChannelAdapter(D, range(6), scale=scale) for _ in range(2))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    save_model(module, tmp_path / "adapter.safetensors")
    load_model(from_file, tmp_path / "adapter.safetensors")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, from_file):
        assert torch.equal(other(x()), expected)
        assert other.weight.data_ptr() != module.weight.data_ptr()
        assert set(other.state_dict()) == set(module.state_dict())


def test_bfloat16_and_float32_masters():
    assert ChannelAdapter(D, CHANNELS, dtype=torch.bfloat16)(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    masters = ChannelAdapter(D, CHANNELS)
    masters(x(dtype=torch.bfloat16)).sum().backward()
    assert masters.weight.grad.dtype == torch.float32


def test_compiled_whole():
    torch._dynamo.reset()
    module = trained(scale="learned")
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x()), module(x()))


def test_repr_names_what_it_is():
    module = ChannelAdapter(D, CHANNELS, scale="learned", bias=False, impl="reference")
    assert repr(module) == ("ChannelAdapter(48, k=6, scale='learned', scale_input=False, bias=False, impl='reference')")
    assert "scale=0.4, scale_input=True, bias=True)" in repr(ChannelAdapter(D, [], scale=0.4, scale_input=True))


@pytest.mark.parametrize("scale", [0.4, "learned"])
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("bias, own_bias", [(True, True), (True, False), (False, True), (False, False)])
def test_merged_is_the_two_in_a_row(scale, scale_input, bias, own_bias):
    module = trained(scale=scale, scale_input=scale_input, bias=own_bias).double()
    linear = nn.Linear(20, D, bias=bias).double().eval().requires_grad_(False)
    before = copy.deepcopy(linear.state_dict())
    merged = module.merge(linear)
    value = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(merged(value), module(linear(value)), rtol=0, atol=1e-14)
    assert type(merged) is nn.Linear and merged is not linear and (merged.bias is not None) == (bias or own_bias)
    assert not any(p.requires_grad for p in merged.parameters()) and not merged.training
    others = [c for c in range(D) if c not in CHANNELS]
    assert torch.equal(merged.weight[others], linear.weight[others])
    assert not torch.equal(merged.weight[list(CHANNELS)], linear.weight[list(CHANNELS)])
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once(dtype):
    module, linear = trained(scale=0.4), nn.Linear(20, D, dtype=dtype)
    exact = copy.deepcopy(module).double().merge(copy.deepcopy(linear).double())
    merged = module.merge(linear)
    assert merged.weight.dtype == dtype and merged.weight.requires_grad
    for name, value in merged.state_dict().items():
        # 0.4 is the same double in both, and every parameter exact in float64.
        assert torch.equal(value, exact.state_dict()[name].to(dtype)), name


def test_what_cannot_be_merged_is_refused():
    module = ChannelAdapter(D, CHANNELS)
    with pytest.raises(ValueError, match="ChannelAdapter: linear must have out_features = d_model = 48, got 47"):
        module.merge(nn.Linear(20, 47))
    with pytest.raises(TypeError, match=r"ChannelAdapter: linear must be a plain nn\.Linear, got Conv1d"):
        module.merge(nn.Conv1d(20, D, 1))
    with pytest.raises(TypeError, match=r"must be a plain nn\.Linear, got NonDynamicallyQuantizableLinear"):
        module.merge(nn.modules.linear.NonDynamicallyQuantizableLinear(20, D))
    with pytest.raises(ValueError, match="ChannelAdapter: linear must be on cpu, got meta"):
        module.merge(nn.Linear(20, D, device="meta"))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=0), "d_model must be an integer of at least 1, got 0"),
        (dict(d_model=4.0), r"d_model must be an integer of at least 1, got 4\.0"),
        (dict(channels=[0, D]), r"channels must be integers in \[0, 48\), got 48"),
        (dict(channels=[-1]), r"channels must be integers in \[0, 48\), got -1"),
        (dict(channels=[1.0]), r"channels must be integers in \[0, 48\), got 1\.0"),
        (dict(channels=[3, 4, 3]), "channels must be distinct, got 3 more than once"),
        (dict(channels=torch.tensor([3, 3])), "channels must be distinct, got 3 more than once"),
        (dict(channels=torch.zeros(2, 2).long()), r"channels must be int64 \[k\] with values, got .*\[2, 2\]"),
        (dict(channels=torch.ones(D).bool()), r"channels must be int64 \[k\] with values, got torch.bool"),
        (dict(channels=torch.ones(2, device="meta").long()), "channels must be .* with values, got .* on meta"),
        (dict(scale="channel"), "scale must be a float or 'learned', got 'channel'"),
        (dict(scale=True), "scale must be a float or 'learned', got True"),
        (dict(scale=None), "scale must be a float or 'learned', got None"),
        (dict(impl="fast"), r"impl must be one of .*'reference'.*, got 'fast'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"^ChannelAdapter: {message}"):
        ChannelAdapter(**{"d_model": D, "channels": CHANNELS, **bad})
