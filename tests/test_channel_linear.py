"""`channel_linear` beyond the table: bad input, what it writes and when, what it saves, what it never computes."""

from __future__ import annotations

import pytest
import torch
from table import DTYPES, check_refused, demanded, setting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels import channel_linear
from petl_kernels.profiling import saved_bytes

N, D_IN, D_OUT, K = 5, 8, 6, 3
t = torch.zeros


def good(dim=0, **changed):
    call = dict(
        x=torch.randn(N, D_IN),
        weight=torch.randn(D_OUT, D_IN),
        bias=torch.randn(D_OUT),
        channels=torch.tensor([4, 0, 2]),
        channel_weight=torch.randn((K, D_IN) if dim == 0 else (D_OUT, K)).requires_grad_(),
        channel_bias=torch.randn(K).requires_grad_() if dim == 0 else None,
        dim=dim,
    )
    return call | changed


def index(*values):
    return torch.tensor(values, dtype=torch.long)


BAD = {
    "x-none": (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    "x-rank": (dict(x=t(())), ValueError, "x must be .* got a 0-dim tensor"),
    "x-integer": (dict(x=t(N, D_IN, dtype=torch.long)), TypeError, "x must be float32, .* got torch.int64"),
    "weight-width": (
        dict(weight=t(D_OUT, 9)),
        ValueError,
        r"weight must be \[d_out, d_in\] with d_in = 8 .* got \[6, 9\]",
    ),
    "weight-rank": (dict(weight=t(D_IN)), ValueError, r"weight must be \[d_out, d_in\] .* got \[8\]"),
    "weight-trains": (dict(weight=t(D_OUT, D_IN).requires_grad_()), ValueError, "weight must be frozen .* trains"),
    "weight-device": (
        dict(weight=t(D_OUT, D_IN, device="meta")),
        ValueError,
        "weight must be on x's device cpu, got meta",
    ),
    "weight-float64": (dict(weight=t(D_OUT, D_IN).double()), TypeError, "weight is torch.float64 beside x of"),
    "bias-length": (dict(bias=t(K)), ValueError, r"bias must be \[d_out\] = \[6\], got \[3\]"),
    "bias-dtype": (
        dict(bias=t(D_OUT).half()),
        TypeError,
        "bias must have weight's dtype torch.float32, got torch.float16",
    ),
    "bias-trains": (dict(bias=t(D_OUT).requires_grad_()), ValueError, "bias must be frozen .* trains"),
    "weight-overlaps": (dict(weight=t(1, D_IN).expand(D_OUT, -1)), ValueError, r"weight must not .* strides \(0, 1\)"),
    "bias-overlaps": (dict(bias=t(1).expand(D_OUT)), ValueError, "bias must not overlap itself"),
    "channels-list": (dict(channels=[0, 1, 2]), TypeError, "channels must be a tensor, got list"),
    "channels-int32": (
        dict(channels=t(K, dtype=torch.int32)),
        TypeError,
        r"channels must be int64 \[k\], got torch.int32 \[3\]",
    ),
    "channels-mask": (
        dict(channels=t(D_OUT, dtype=torch.bool)),
        TypeError,
        r"channels must be int64 \[k\], got torch.bool",
    ),
    "channels-rank": (
        dict(channels=index(1, 2, 3)[None]),
        TypeError,
        r"channels must be int64 \[k\], got torch.int64 \[1, 3\]",
    ),
    "channels-twice": (dict(channels=index(4, 2, 4)), ValueError, "channels must be distinct, got 4 more than once"),
    "channels-negative": (dict(channels=index(0, -1, 2)), ValueError, r"channels must lie in \[0, 6\), got -1"),
    "channels-beyond": (dict(channels=index(0, 6, 7)), ValueError, r"channels must lie in \[0, 6\), got 6, 7"),
    "channels-device": (
        dict(channels=index(0, 1, 2).to("meta")),
        ValueError,
        "channels must be on x's device cpu, got meta",
    ),
    "channel_weight-shape": (
        dict(channel_weight=t(D_IN, K)),
        ValueError,
        r"channel_weight must be \[k, d_in\] = \[3, 8\], got \[8, 3\]",
    ),
    "channel_weight-none": (dict(channel_weight=None), TypeError, "channel_weight must be a tensor, got NoneType"),
    "channel_bias-length": (dict(channel_bias=t(2)), ValueError, r"channel_bias must be \[k\] = \[3\], got \[2\]"),
    "channel_bias-dtype": (dict(channel_bias=t(K).half()), TypeError, "channel_bias must have channel_weight's dtype"),
    "channel_bias-alone": (dict(bias=None), ValueError, "channel_bias must be None where bias is, got a tensor"),
    "dim": (dict(dim=2), ValueError, r"dim must be 0 \(output rows\) or 1 \(input columns\), got 2"),
    "dim-bool": (dict(dim=True), ValueError, "dim must be 0 .* got True"),
    "impl": (dict(impl="fast"), ValueError, "impl must be one of .*, got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(channel_linear, good(**changed), error, message)


def test_bad_input_columns():
    for changed, message in [
        (dict(channel_weight=t(K, D_IN)), r"channel_weight must be \[d_out, k\] = \[6, 3\], got \[3, 8\]"),
        (dict(channel_bias=t(K)), "channel_bias must be None with dim=1"),
        (dict(channels=index(0, 1, 8)), r"channels must lie in \[0, 8\), got 8"),
    ]:
        check_refused(channel_linear, good(dim=1, **changed), ValueError, message)


def test_channels_that_are_changed_are_read_again():
    call = good()
    channel_linear(**call)
    call["channels"][0] = 17
    with pytest.raises(ValueError, match="got 17"):
        channel_linear(**call)


@pytest.fixture(params=[impl for impl in DTYPES if impl != "reference" and demanded(impl)])
def impl(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("these tests are on the CPU")
    return request.param


@pytest.mark.parametrize("dim", [0, 1])
def test_the_chosen_part_is_written_in_place_and_nothing_else(impl, dim):
    call = good(dim)
    weight, bias = call["weight"], call["bias"]
    before = weight.clone(), bias.clone()
    address = weight.data_ptr()
    y = channel_linear(**call, impl=impl)
    wanted = before[0].index_copy(dim, call["channels"], call["channel_weight"].detach())
    assert torch.equal(weight, wanted) and weight.data_ptr() == address
    if dim == 0:
        assert torch.equal(bias, before[1].index_copy(0, call["channels"], call["channel_bias"].detach()))
    assert torch.equal(y, nn.functional.linear(call["x"], weight, bias))


def test_used_twice_in_a_forward(impl):
    call = good()
    call["x"] = call["x"].requires_grad_()
    square = torch.randn(D_OUT, D_IN) * 0.1

    def twice(**options):
        x = channel_linear(**call, **options)
        again = channel_linear(**(call | dict(x=x @ square)), **options)
        return torch.autograd.grad(again.square().sum(), [call["x"], call["channel_weight"], call["channel_bias"]])

    for ours, wanted in zip(twice(impl=impl), twice(impl="reference")):
        torch.testing.assert_close(ours, wanted)


def test_a_step_between_forward_and_backward_is_noticed(impl):
    call = good()
    x = call["x"].requires_grad_()
    y = channel_linear(**call, impl=impl)
    with torch.no_grad():
        call["channel_weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_who_saved_the_weight_before_is_told(impl):
    call = good()
    x = call["x"].clone().requires_grad_()
    channel_linear(**call, impl=impl)
    with torch.no_grad():
        call["channel_weight"].add_(1)
    other = nn.functional.linear(x, call["weight"])
    channel_linear(**call, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other.sum(), x)


def test_two_tasks_on_one_weight(impl):
    """Interleaved forwards with parts of their own: the second invalidates the first instead of spoiling it."""
    call = good()
    other = call | dict(channel_weight=torch.randn(K, D_IN).requires_grad_())
    x = call["x"].requires_grad_()
    first = channel_linear(**call, impl=impl)
    second = channel_linear(**other, impl=impl)
    torch.autograd.grad(second.sum(), x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), x)


def test_saved_bytes(impl):
    n, d, k = 64, 96, 12
    for dim, wanted in ((0, n * d * 4), (1, n * k * 4)):
        layer = nn.Linear(d, d).requires_grad_(False)
        call = dict(
            x=torch.randn(n, d),
            weight=layer.weight,
            bias=layer.bias,
            channels=torch.randperm(d)[:k],
            channel_weight=torch.randn((k, d) if dim == 0 else (d, k)).requires_grad_(),
            dim=dim,
        )
        apart = (call["weight"], call["channel_weight"], call["channels"])
        assert saved_bytes(lambda call=call: channel_linear(**call, impl=impl), exclude=apart) == wanted


class Products(TorchDispatchMode):
    """Records the shapes of what matrix products return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.shapes.append(tuple(result.shape))
        return result


def test_the_dense_gradient_is_never_formed(impl):
    call = good()
    x = call["x"].requires_grad_()
    leaves = [x, call["channel_weight"], call["channel_bias"]]
    shapes = {}
    for name in (impl, "reference"):
        y = channel_linear(**call, impl=name)
        with Products() as products:
            torch.autograd.grad(y.sum(), leaves)
        shapes[name] = products.shapes
    assert (D_OUT, D_IN) in shapes["reference"] or (D_IN, D_OUT) in shapes["reference"]
    assert shapes[impl] == [(N, D_IN)]  # dx


def test_a_bfloat16_weight_under_float32_channels(impl):
    """The usual fp32 masters: y is that of the rounded part, the gradient is in the masters' dtype."""
    call = good()
    for name in ("x", "weight", "bias"):
        call[name] = call[name].bfloat16()
    y = channel_linear(**call, impl=impl)
    assert y.dtype == torch.bfloat16
    assert torch.equal(call["weight"][call["channels"]], call["channel_weight"].detach().bfloat16())
    (grad,) = torch.autograd.grad(y.sum(), call["channel_weight"])
    assert grad.dtype == torch.float32


def test_inference_mode(impl):
    call = good()
    wanted = channel_linear(**call, impl="reference")
    with torch.inference_mode():
        assert torch.allclose(channel_linear(**call, impl=impl), wanted)
        made_inside = good() | {name: call[name].clone() for name in ("x", "weight", "bias", "channels")}
        channel_linear(**made_inside, impl=impl)


def test_many_rows(impl):
    """More rows than one round of packing holds, and fewer columns than a panel."""
    n, d, k = (9001, 20, 13) if impl == "cpp" else (300, 20, 13)
    x, g = torch.randn(n, d), torch.randn(n, d)
    channels = torch.randperm(d)[:k]
    channel_weight = torch.randn(k, d, requires_grad=True)
    y = channel_linear(x, torch.randn(d, d), None, channels, channel_weight, impl=impl)
    (grad,) = torch.autograd.grad(y, channel_weight, g)
    wanted = g[:, channels].double().t() @ x.double()
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_the_number_of_threads_changes_no_bit():
    call = good(
        x=torch.randn(999, 100), weight=torch.randn(80, 100), bias=torch.randn(80), channels=torch.arange(3, 43)
    )
    call |= dict(
        channel_weight=torch.randn(40, 100, requires_grad=True), channel_bias=torch.randn(40, requires_grad=True)
    )
    leaves = [call["channel_weight"], call["channel_bias"]]
    results = []
    for count in (1, 2, 3):
        with setting(threads=count):
            results.append(torch.autograd.grad(channel_linear(**call, impl="cpp").square().sum(), leaves))
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again))
