"""`petl_kernels.nn.ChannelLinear`: a linear of which some channels train, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from table import impls
from torch import nn
from torch.utils.checkpoint import checkpoint

from petl_kernels.nn import ChannelLinear
from petl_kernels.testing import CASES

D_IN, D_OUT = 10, 7
CHANNELS = [5, 0, 2]  # in no order
IMPLS = [i for i in impls(next(case for case in CASES if case.name == "channel_linear")) if i != "triton"]
KINDS = [(0, True), (0, False), (1, True), (1, False)]  # dim, bias


def linear(bias=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(D_IN, D_OUT, bias=bias, **kwargs)


def x(seed=1, **kwargs):
    return torch.randn(3, 4, D_IN, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def trained(layer, steps=5, optimizer=None):
    """The layer after some steps, so that its channels differ from what the linear had."""
    optimizer = optimizer or torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        layer(x(step)).square().sum().backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim, bias", KINDS)
def test_starts_as_the_linear_and_shares_its_parameters(dim, bias, impl):
    plain = linear(bias)
    expected = plain(x())
    layer = ChannelLinear.from_linear(plain, CHANNELS, dim=dim, impl=impl)
    assert torch.equal(layer(x()), expected)
    assert layer.weight is plain.weight and layer.bias is plain.bias and not plain.weight.requires_grad
    assert layer.channels.tolist() == CHANNELS
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"channel_weight"} | ({"channel_bias"} if bias and dim == 0 else set())
    assert torch.equal(layer.channel_weight, plain.weight[CHANNELS] if dim == 0 else plain.weight[:, CHANNELS])
    assert ChannelLinear.from_linear(linear(), CHANNELS, bias=False).channel_bias is None


def gathered_steps(plain, dim, steps):
    """AdamW on the gathered rows or columns (and bias entries) themselves, through autograd's dense gradient."""
    plain.requires_grad_(False)
    channels = torch.tensor(CHANNELS)
    chosen = plain.weight.index_select(dim, channels).requires_grad_()
    shift = plain.bias[channels].requires_grad_() if plain.bias is not None and dim == 0 else None
    optimizer = torch.optim.AdamW([p for p in (chosen, shift) if p is not None], lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        bias = plain.bias if shift is None else plain.bias.index_copy(0, channels, shift)
        F.linear(x(step), plain.weight.index_copy(dim, channels, chosen), bias).square().sum().backward()
        optimizer.step()
    return chosen.detach(), None if shift is None else shift.detach()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim, bias", KINDS)
def test_a_hundred_steps_of_adamw_move_the_chosen_channels_only(dim, bias, impl):
    before = linear(bias)
    layer = ChannelLinear.from_linear(linear(bias), CHANNELS, dim=dim, impl=impl)
    # The optimizer is given the frozen tensors too, with weight decay.
    trained(layer, 100, torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1))
    others = torch.tensor([c for c in range((D_OUT, D_IN)[dim]) if c not in CHANNELS])
    for after in (layer, layer.merge()):
        assert torch.equal(after.weight.index_select(dim, others), before.weight.index_select(dim, others))
        if bias:
            rows = others if dim == 0 else torch.arange(D_OUT)
            assert torch.equal(after.bias[rows], before.bias[rows])
    chosen, shift = gathered_steps(before, dim, 100)
    torch.testing.assert_close(layer.channel_weight.detach(), chosen, rtol=1e-4, atol=1e-5)
    assert (layer.channel_weight - linear(bias).weight.index_select(dim, torch.tensor(CHANNELS))).abs().min() > 1e-4
    if shift is not None:
        torch.testing.assert_close(layer.channel_bias.detach(), shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim, bias", KINDS)
@pytest.mark.parametrize(
    "dtype, master", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_merge_is_exact_and_leaves_the_layer_alone(dim, bias, impl, dtype, master):
    layer = ChannelLinear.from_linear(linear(bias, dtype=dtype), CHANNELS, dim=dim, impl=impl)
    if master is not None:
        for name in ("channel_weight", "channel_bias"):
            if getattr(layer, name) is not None:
                setattr(layer, name, nn.Parameter(getattr(layer, name).to(master)))
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    before = {name: t.clone() for name, t in layer.named_parameters()}
    merged = layer.merge()  # before any forward: nothing has written the channels into the weight
    assert all(torch.equal(t, before[name]) for name, t in layer.named_parameters())
    assert type(merged) is nn.Linear and not merged.weight.requires_grad
    value = x(dtype=dtype)
    assert torch.equal(merged(value), layer(value))
    assert merged.weight.dtype == dtype and merged.weight.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(layer.sync_().weight, merged.weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [0, 1])
def test_none_and_all_channels(dim, impl):
    expected = linear()(x())
    none = ChannelLinear.from_linear(linear(), [], dim=dim, impl=impl)
    assert torch.equal(none(x()), expected) and torch.equal(none.merge()(x()), expected)
    none(x().requires_grad_()).sum().backward()
    size = (D_OUT, D_IN)[dim]
    every = trained(ChannelLinear.from_linear(linear(), torch.arange(size).flip(0), dim=dim, impl=impl))
    merged = every.merge()
    assert torch.equal(merged(x()), every(x()))
    moved = merged.weight != linear().weight
    assert moved.any(dim=1 - dim).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("how", ["twice", "reentrant", "not reentrant"])
def test_shared_and_checkpointed(dim, impl, how):
    def square(layer, value):
        if how == "twice":
            return layer(layer(value))
        return layer(checkpoint(layer, value, use_reentrant=how == "reentrant"))

    torch.manual_seed(0)
    plain = nn.Linear(D_IN, D_IN)
    ours, theirs = (
        ChannelLinear.from_linear(copy.deepcopy(plain), CHANNELS, dim=dim, impl=i) for i in (impl, "reference")
    )
    inputs = [x().requires_grad_() for _ in range(2)]
    square(ours, inputs[0]).sin().sum().backward()
    theirs(theirs(inputs[1])).sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.channel_weight.grad, theirs.channel_weight.grad)
    if dim == 0:
        torch.testing.assert_close(ours.channel_bias.grad, theirs.channel_bias.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    layer = ChannelLinear.from_linear(linear(), CHANNELS, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x())
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer.merge()(x()))
    y.float().sum().backward()
    assert layer.channel_weight.grad.dtype == torch.float32 and layer.channel_weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim, bias", KINDS)
def test_state_dict(dim, bias, impl):
    layer = trained(ChannelLinear.from_linear(linear(bias), CHANNELS, dim=dim, impl=impl))
    state = layer.state_dict()
    expected = {"weight", "channels", "channel_weight"} | ({"bias"} if bias else set())
    assert set(state) == expected | ({"channel_bias"} if bias and dim == 0 else set())
    # Up to date although the optimizer made the last step: fit for a plain linear.
    plain = linear(bias, seed=5)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.equal(plain(x()), layer(x()))

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = ChannelLinear.from_linear(linear(bias, seed=9), [1, 3, 4], dim=dim, impl=impl)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.channels.tolist() == CHANNELS
    assert torch.equal(other(x()), layer(x())) and torch.equal(other.merge().weight, layer.merge().weight)


def test_loading_takes_the_trained_channels_for_the_master():
    layer = ChannelLinear.from_linear(linear(), CHANNELS)
    state = copy.deepcopy(layer.state_dict())
    state["channel_weight"] += 1
    layer.load_state_dict(state)
    assert torch.equal(layer.weight[CHANNELS], state["channel_weight"])

    before = copy.deepcopy(layer.state_dict())
    for wrong, message in [
        (dict(channels=torch.tensor([0, 0, 1])), "channels must be distinct"),
        (dict(channels=torch.tensor([0, 7, 1])), r"channels must lie in \[0, 7\)"),
        (dict(channel_weight=torch.zeros(2, D_IN)), "size mismatch for channel_weight"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(before | wrong)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items() if name not in wrong)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(linear().state_dict())


@pytest.mark.parametrize("impl", IMPLS)
def test_resumes_from_a_checkpoint(impl):
    def start():
        layer = ChannelLinear.from_linear(linear(), CHANNELS, impl=impl)
        return layer, torch.optim.AdamW([layer.channel_weight, layer.channel_bias], lr=0.05, weight_decay=0.1)

    straight, optimizer = start()
    trained(trained(straight, 5, optimizer), 5, optimizer)
    first, optimizer = start()
    trained(first, 5, optimizer)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    resumed, optimizer = start()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    trained(resumed, 5, optimizer)
    assert all(torch.equal(t, straight.state_dict()[name]) for name, t in resumed.state_dict().items())


def test_copies():
    layer = trained(ChannelLinear.from_linear(linear(), CHANNELS))
    expected = layer(x())
    pair = nn.ModuleDict({"a": layer, "b": nn.Linear(D_IN, D_OUT)})
    pair["b"].weight = layer.weight
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x()), expected) and not other.weight.requires_grad
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        trained(other)
    assert torch.equal(layer(x()), expected)
    copied = copy.deepcopy(pair)
    assert copied["a"].weight is copied["b"].weight  # shared inside of what was copied


def test_dtype_device_and_subclass():
    layer = ChannelLinear.from_linear(linear(), CHANNELS, dim=1).to(torch.bfloat16)
    assert layer.channel_weight.dtype == torch.bfloat16 and layer.channels.dtype == torch.int64
    assert layer(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    double = ChannelLinear.from_linear(linear().double(), CHANNELS)
    assert double(x(dtype=torch.float64)).dtype == torch.float64

    deferred = ChannelLinear.from_linear(linear(device="meta"), CHANNELS, dim=1)
    assert (
        deferred.channels.is_meta and deferred.channel_weight.shape == (D_OUT, 3) and deferred(x().to("meta")).is_meta
    )
    assert deferred.merge().weight.is_meta
    ready = deferred.to_empty(device="cpu")
    ready.load_state_dict(ChannelLinear.from_linear(linear(), CHANNELS, dim=1).state_dict())
    assert torch.equal(ready(x()), linear()(x()))

    class Named(nn.Linear):
        pass

    assert ChannelLinear.from_linear(Named(D_IN, D_OUT), CHANNELS)(x()).shape == (3, 4, D_OUT)


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_mode_and_compiled(impl):
    layer = trained(ChannelLinear.from_linear(linear(), CHANNELS, impl=impl))
    expected = layer.merge()(x())
    with torch.inference_mode():
        assert torch.equal(layer(x()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), expected)


def test_a_stale_gradient_moves_nothing():
    plain = linear()
    plain(x()).sum().backward()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
    before = plain.weight.detach().clone()
    ChannelLinear.from_linear(plain, CHANNELS)
    optimizer.step()
    assert torch.equal(plain.weight, before)


def test_repr():
    layer = ChannelLinear.from_linear(linear(), CHANNELS, impl="reference")
    assert repr(layer) == ("ChannelLinear(10, 7, 3 of 7 output rows, bias=True, channel_bias=True, impl='reference')")
    assert "2 of 10 input columns" in repr(ChannelLinear.from_linear(linear(), [1, 2], dim=1))


class OwnForward(nn.Linear):
    def forward(self, value):
        return super().forward(value) * 2


def parametrized():
    return nn.utils.parametrizations.weight_norm(linear())


def index(*values, **kwargs):
    return torch.tensor(values, **kwargs)


BAD = {
    "twice": (dict(channels=[1, 2, 1]), ValueError, "channels must be distinct, got 1 more than once"),
    "negative": (dict(channels=index(0, -1)), ValueError, r"channels must lie in \[0, 7\), got -1"),
    "beyond": (dict(channels=[7]), ValueError, r"channels must lie in \[0, 7\), got 7"),
    "beyond-columns": (dict(channels=[10], dim=1), ValueError, r"channels must lie in \[0, 10\), got 10"),
    "device": (dict(channels=index(1).to("meta")), ValueError, "channels must be on weight's device cpu, got meta"),
    "int32": (dict(channels=index(1, dtype=torch.int32)), TypeError, "channels must be int64 .* got torch.int32"),
    "mask": (dict(channels=torch.ones(7, dtype=torch.bool)), TypeError, "channels must be int64 .* got torch.bool"),
    "matrix": (dict(channels=index(1, 2)[None]), TypeError, r"channels must be int64 \[k\], got torch.int64 \[1, 2\]"),
    "floats": (dict(channels=[1.0]), TypeError, "channels must be integers, got 1.0"),
    "bools": (dict(channels=[True]), TypeError, "channels must be integers, got True"),
    "number": (dict(channels=3), TypeError, "channels must be int64 .* got int"),
    "dim": (dict(dim=2), ValueError, "dim must be 0 .* got 2"),
    "dim-bool": (dict(dim=True), ValueError, "dim must be 0 .* got True"),
    "impl": (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    "no-linear": (dict(linear=nn.LayerNorm(3)), TypeError, "linear must be an nn.Linear, got LayerNorm"),
    "own-forward": (dict(linear=OwnForward(D_IN, D_OUT)), TypeError, "OwnForward has a forward of its own"),
    "parametrized": (dict(linear=parametrized()), TypeError, "must be a Parameter; this one is computed"),
    "float8": (
        dict(linear=linear().to(torch.float8_e4m3fn)),
        TypeError,
        "must be float32, .* got torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    call = dict(linear=linear(), channels=CHANNELS) | changed
    given = call["linear"]
    flags = [p.requires_grad for p in given.parameters()]
    with pytest.raises(error, match=f"^ChannelLinear: .*{message}"):
        ChannelLinear.from_linear(call.pop("linear"), call.pop("channels"), **call)
    assert [p.requires_grad for p in given.parameters()] == flags
