"""`petl_kernels.nn.IA3Linear`: the formula, a start as the linear itself, merging, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from table import Recorder, impls
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from petl_kernels.nn import IA3Linear
from petl_kernels.testing import CASES

D_IN, D_OUT = 10, 7
IMPLS = [i for i in impls(next(case for case in CASES if case.name == "channel_scale")) if i != "triton"]
EVERY_IMPL = pytest.mark.parametrize("impl", IMPLS)
EVERY_SIDE = pytest.mark.parametrize("side", ["output", "input"])
EVERY_BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def linear(bias=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(D_IN, D_OUT, bias=bias, **kwargs)


def x(seed=1, **kwargs):
    return torch.randn(3, 4, D_IN, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def layer(side, bias=True, impl=None, scale_dtype=None, **kwargs):
    """One whose vector is no longer ones."""
    made = IA3Linear.from_linear(linear(bias, **kwargs), side=side, impl=impl, dtype=scale_dtype)
    with torch.no_grad():
        made.scale.copy_(torch.randn(made.scale.shape) * 0.5 + 1)
    return made


def formula(value, weight, bias, scale, side):
    return F.linear(value * scale, weight, bias) if side == "input" else F.linear(value, weight, bias) * scale


@EVERY_IMPL
@EVERY_SIDE
@EVERY_BIAS
def test_is_the_formula(side, bias, impl):
    ours = layer(side, bias, impl, dtype=torch.float64)
    value = x(dtype=torch.float64).requires_grad_()
    y = ours(value)
    expected = formula(value, ours.weight, ours.bias, ours.scale, side)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    g = torch.randn_like(y)
    grads = [torch.autograd.grad(out, (value, ours.scale), g) for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


@EVERY_IMPL
@EVERY_SIDE
@EVERY_BIAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_linear_and_shares_its_parameters(side, bias, impl, dtype):
    plain = linear(bias, dtype=dtype)
    expected = plain(x(dtype=dtype))
    ours = IA3Linear.from_linear(plain, side=side, impl=impl)
    assert torch.equal(ours(x(dtype=dtype)), expected)
    assert ours.weight is plain.weight and ours.bias is plain.bias and not plain.weight.requires_grad
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"scale"}
    assert ours.scale.dtype == dtype and ours.scale.shape == (D_OUT if side == "output" else D_IN,)
    assert torch.equal(ours.scale, torch.ones_like(ours.scale))


@EVERY_IMPL
@EVERY_SIDE
def test_trains_the_vector_and_leaves_the_base_alone(side, impl):
    plain = linear()
    plain(x()).sum().backward()  # a stale gradient, with which an optimizer would move the base
    ours, before = IA3Linear.from_linear(plain, side=side, impl=impl), copy.deepcopy(linear().state_dict())
    start = ours(x()).detach()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        ours(x(step)).square().sum().backward()
        optimizer.step()
    assert ours.weight.grad is None and ours.bias.grad is None
    assert torch.equal(ours.weight, before["weight"]) and torch.equal(ours.bias, before["bias"])
    assert (ours.scale != 1).all() and not torch.equal(ours(x()), start)


@EVERY_SIDE
def test_one_call_of_the_op_each_way(side):
    ours, value = layer(side, impl="cpp"), x().requires_grad_()
    with Recorder() as recorder:
        ours(value).sum().backward()
    assert len(recorder.calls) == 2


@EVERY_SIDE
@EVERY_BIAS
@pytest.mark.parametrize(
    "dtype, scale_dtype",
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_merge_is_rounded_once_and_leaves_the_layer_alone(side, bias, dtype, scale_dtype):
    ours = layer(side, bias, scale_dtype=scale_dtype, dtype=dtype).eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    merged = ours.merge()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert type(merged) is nn.Linear and not merged.training
    assert not any(p.requires_grad for p in merged.parameters())
    factors = ours.scale.double()
    wanted = ours.weight.double() * (factors if side == "input" else factors[:, None])
    assert torch.equal(merged.weight, wanted.to(dtype)) and merged.weight.data_ptr() != ours.weight.data_ptr()
    if bias:
        wanted = ours.bias.double() * factors if side == "output" else ours.bias
        assert torch.equal(merged.bias, wanted.to(dtype)) and merged.bias.data_ptr() != ours.bias.data_ptr()
    assert (merged.bias is None) == (not bias)
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(merged(x(dtype=dtype)), ours(x(dtype=dtype)))
    unscaled = IA3Linear.from_linear(linear(bias, dtype=dtype), side=side).merge()
    assert torch.equal(unscaled(x(dtype=dtype)), linear(bias, dtype=dtype)(x(dtype=dtype)))


@EVERY_SIDE
def test_output_of_the_first_linear_is_input_of_the_second(side):
    """In a feed-forward layer with relu a positive vector may stand on either side of the activation."""
    torch.manual_seed(0)
    up, down, scale = nn.Linear(D_IN, 12), nn.Linear(12, D_IN), torch.rand(12) + 0.5
    first, second = copy.deepcopy(up), copy.deepcopy(down)
    if side == "output":
        first = IA3Linear.from_linear(first, side=side)
        first.scale.data.copy_(scale)
    else:
        second = IA3Linear.from_linear(second, side=side)
        second.scale.data.copy_(scale)
    torch.testing.assert_close(second(first(x()).relu()), down(up(x()).relu() * scale))


@EVERY_IMPL
@EVERY_SIDE
@pytest.mark.parametrize("how", ["twice", "reentrant", "not reentrant"])
def test_shared_and_checkpointed(side, impl, how):
    torch.manual_seed(0)
    plain = nn.Linear(D_IN, D_IN)
    ours, theirs = (IA3Linear.from_linear(copy.deepcopy(plain), side=side, impl=i) for i in (impl, "reference"))
    inputs = [x().requires_grad_() for _ in range(2)]
    inner = ours(inputs[0]) if how == "twice" else checkpoint(ours, inputs[0], use_reentrant=how == "reentrant")
    ours(inner).sin().sum().backward()
    theirs(theirs(inputs[1])).sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.scale.grad, theirs.scale.grad)


@EVERY_IMPL
@EVERY_SIDE
def test_autocast_and_a_float32_vector_beside_bfloat16(side, impl):
    ours = layer(side, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and ours.scale.grad.dtype == torch.float32 and ours.scale.grad.any()
    mixed = layer(side, impl=impl, scale_dtype=torch.float32, dtype=torch.bfloat16)
    y = mixed(x(dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and mixed.scale.grad.dtype == torch.float32


@EVERY_SIDE
@EVERY_BIAS
def test_state_dict(side, bias):
    ours = layer(side, bias)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {"weight", "scale"} | ({"bias"} if bias else set())
    other = IA3Linear.from_linear(linear(bias, seed=9), side=side)
    other.load_state_dict(state)
    assert torch.equal(other(x()), ours(x()))
    other.reset_parameters()
    assert torch.equal(other(x()), linear(bias)(x()))
    # What a plain linear has saved is loaded under the same names.
    missing, unexpected = other.load_state_dict(linear(bias, seed=5).state_dict(), strict=False)
    assert missing == ["scale"] and not unexpected
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        other.load_state_dict(state | {"scale": torch.ones(3)})


def test_copies():
    ours = layer("output")
    expected = ours(x())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x()), expected) and not other.weight.requires_grad and other.scale.requires_grad
        assert other.side == "output" and other.weight.data_ptr() != ours.weight.data_ptr()
        other.scale.data.fill_(0)
    assert torch.equal(ours(x()), expected)


@EVERY_SIDE
def test_dtype_device_and_subclass(side):
    ours = layer(side).to(torch.bfloat16)
    assert ours.scale.dtype == torch.bfloat16 and ours(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    deferred = IA3Linear.from_linear(linear(device="meta"), side=side)
    assert deferred.scale.is_meta and deferred(x().to("meta")).is_meta and deferred.merge().weight.is_meta
    ready = deferred.to_empty(device="cpu")
    ready.load_state_dict(IA3Linear.from_linear(linear(), side=side).state_dict())
    assert torch.equal(ready(x()), linear()(x()))

    class Named(nn.Linear):
        pass

    assert IA3Linear.from_linear(Named(D_IN, D_OUT), side=side)(x()).shape == (3, 4, D_OUT)


@EVERY_IMPL
@EVERY_SIDE
def test_inference_mode_and_compiled(side, impl):
    ours = layer(side, impl=impl)
    expected = ours(x())
    with torch.inference_mode():
        assert torch.equal(ours(x()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), expected)


def test_number_of_parameters():
    """Per layer: encoder 2 inner + d_ff, decoder 4 inner + d_ff (Liu et al., as T5 has them)."""
    d, inner, d_ff = 10, 12, 20

    def attention():
        projections = dict(q=(d, inner), k=(d, inner), v=(d, inner), o=(inner, d))
        made = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in projections.items()})
        for name in ("k", "v"):
            made[name] = IA3Linear.from_linear(made[name], side="output")
        return made

    def feed_forward():
        return IA3Linear.from_linear(nn.Linear(d_ff, d, bias=False), side="input")

    def trained(*parts):
        layers = [module for part in parts for module in part.modules() if isinstance(module, IA3Linear)]
        return sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)

    assert trained(attention(), feed_forward()) == 2 * inner + d_ff
    assert trained(attention(), attention(), feed_forward()) == 4 * inner + d_ff


def test_repr():
    assert repr(layer("output")) == "IA3Linear(10, 7, side='output', bias=True)"
    assert repr(layer("input", False, "cpp")) == "IA3Linear(10, 7, side='input', bias=False, impl='cpp')"


class OwnForward(nn.Linear):
    def forward(self, value):
        return super().forward(value) * 2


def parametrized():
    return nn.utils.parametrizations.weight_norm(linear())


BAD = {
    "side": (dict(side="both"), ValueError, "side must be one of .* got 'both'"),
    "side-number": (dict(side=0), ValueError, "side must be one of .* got 0"),
    "impl": (dict(impl="fast"), ValueError, "impl must be one of .* got 'fast'"),
    "no-linear": (dict(linear=nn.LayerNorm(3)), TypeError, "linear must be an nn.Linear, got LayerNorm"),
    "own-forward": (dict(linear=OwnForward(D_IN, D_OUT)), TypeError, "OwnForward has a forward of its own"),
    "parametrized": (dict(linear=parametrized()), TypeError, "must be a Parameter; this one is computed"),
    "float8": (dict(linear=linear().to(torch.float8_e4m3fn)), TypeError, "got torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    call = dict(linear=linear()) | changed
    given = call.pop("linear")
    flags = [p.requires_grad for p in given.parameters()]
    with pytest.raises(error, match=f"^IA3Linear: .*{message}"):
        IA3Linear.from_linear(given, **call)
    assert [p.requires_grad for p in given.parameters()] == flags


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_slices_of_a_fused_projection(kind):
    torch.manual_seed(0)
    plain = (nn.Linear(D_IN, D_OUT) if kind is nn.Linear else Conv1D(D_OUT, D_IN)).double()
    made = IA3Linear.from_linear(plain, slices=((5, 7), (1, 3)))
    value = x(dtype=torch.float64)
    assert torch.equal(made(value), F.linear(value, made.weight if kind is nn.Linear else made.weight.T, made.bias))
    nn.init.normal_(made.scale)
    expected, weight = plain(value), made.weight if kind is nn.Linear else made.weight.T
    expected[..., 1:3] = F.linear(value, weight[1:3], made.bias[1:3]) * made.scale[:2]
    expected[..., 5:7] = F.linear(value, weight[5:7], made.bias[5:7]) * made.scale[2:]
    y = made(value)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), made.scale)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.merge()(value), expected, rtol=1e-12, atol=1e-12)
    assert "slices=((1, 3), (5, 7))" in repr(made)
    with pytest.raises(
        ValueError, match=r"IA3Linear: slices must be pairs 0 <= start < stop <= 7 .*, got \(\(5, 8\),\)"
    ):
        IA3Linear.from_linear(plain, slices=((5, 8),))
    with pytest.raises(ValueError, match="slices are of the output, so they must be None where side is 'input'"):
        IA3Linear.from_linear(plain, side="input", slices=((0, 2),))
