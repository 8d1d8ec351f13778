"""`channel_adapter`: bad input, and numbers against the dense formula y = x T^T + e instead of the reference."""

from __future__ import annotations

import pytest
import torch
from table import DTYPES, check_refused, impls, kernels

from petl_kernels import channel_adapter
from petl_kernels.testing import CASES, arguments, in_float64, run

CASE = next(case for case in CASES if case.name == "channel_adapter")
N, D, K = 3, 8, 4


def good(**changed):
    call = dict(
        x=torch.zeros(N, D),
        channels=torch.tensor([6, 1, 3, 0]),
        weight=torch.zeros(K, K),
        bias=torch.zeros(K),
        scale=torch.ones(1),
        scale_input=False,
    )
    return call | changed


t = torch.zeros
of = torch.tensor
BAD = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-none": (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    "x-integer": (dict(x=t(N, D, dtype=torch.long)), TypeError, "x must be float32, .* got torch.int64"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[..., d\] .* got a 0-dim tensor"),
    "x-narrow": (dict(x=t(N, 6)), ValueError, r"channels must lie in \[0, 6\), got 6"),
    "channels-list": (dict(channels=[0, 1, 2, 3]), TypeError, "channels must be a tensor, got list"),
    "channels-none": (dict(channels=None), TypeError, "channels must be a tensor, got NoneType"),
    "channels-int32": (
        dict(channels=of([6, 1, 3, 0]).int()),
        TypeError,
        r"channels must be int64 \[k\], got torch.int32 \[4\]",
    ),
    "channels-mask": (dict(channels=t(D).bool()), TypeError, r"channels must be int64 \[k\], got torch.bool \[8\]"),
    "channels-rank": (dict(channels=t(2, 2).long()), TypeError, r"channels must be int64 \[k\], got .* \[2, 2\]"),
    "channels-device": (
        dict(channels=t(K, device="meta").long()),
        ValueError,
        "channels must be on x's device cpu, got meta",
    ),
    "channels-duplicate": (
        dict(channels=of([6, 1, 3, 1])),
        ValueError,
        "channels must be distinct, got 1 more than once",
    ),
    "channels-negative": (dict(channels=of([6, -1, 3, 0])), ValueError, r"channels must lie in \[0, 8\), got -1"),
    "channels-beyond": (dict(channels=of([6, 1, 8, 99])), ValueError, r"channels must lie in \[0, 8\), got 8, 99"),
    "channels-too-few": (
        dict(channels=of([6, 1])),
        ValueError,
        r"weight must be \[k, k\] = \[2, 2\], got \[4, 4\]",
    ),
    "weight-none": (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    "weight-rank": (dict(weight=t(K)), ValueError, r"weight must be \[k, k\] = \[4, 4\], got \[4\]"),
    "weight-rectangular": (dict(weight=t(K, D)), ValueError, r"weight must be \[k, k\] = \[4, 4\], got \[4, 8\]"),
    "weight-dense": (dict(weight=t(D, D)), ValueError, r"weight must be \[k, k\] = \[4, 4\], got \[8, 8\]"),
    "weight-integer": (dict(weight=t(K, K).long()), TypeError, "weight must be float32, .* got torch.int64"),
    "weight-float64": (dict(weight=t(K, K).double()), TypeError, "weight is torch.float64 beside x of torch.float32"),
    "weight-device": (dict(weight=t(K, K, device="meta")), ValueError, "weight must be on x's device cpu, got meta"),
    "bias-length": (dict(bias=t(D)), ValueError, r"bias must be \[k\] = \[4\], got \[8\]"),
    "bias-rank": (dict(bias=t(1, K)), ValueError, r"bias must be \[k\] = \[4\], got \[1, 4\]"),
    "bias-dtype": (
        dict(bias=t(K).half()),
        TypeError,
        "bias must have weight's dtype torch.float32, got torch.float16",
    ),
    "bias-device": (dict(bias=t(K, device="meta")), ValueError, "bias must be on x's device cpu, got meta"),
    "scale-shape": (dict(scale=t(K)), ValueError, r"scale must be a float, \[\] or \[1\], got \[4\]"),
    "scale-string": (dict(scale="learned"), TypeError, "scale must be a float or a tensor, got str"),
    "scale-bool": (dict(scale=True), TypeError, "scale must be a float or a tensor, got bool"),
    "scale-none": (dict(scale=None), TypeError, "scale must be a float or a tensor, got NoneType"),
    "scale-integer": (dict(scale=t(()).long()), TypeError, "scale must be float32, .* got torch.int64"),
    "scale-device": (dict(scale=t(1, device="meta")), ValueError, "scale must be on x's device cpu, got meta"),
    "scale_input": (dict(scale_input=0.4), TypeError, "scale_input must be True or False, got 0.4"),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(channel_adapter, good(**changed), error, message)


def test_channels_changed_in_place_are_checked_again():
    call = good()
    channel_adapter(**call)
    call["channels"][0] = 1
    with pytest.raises(ValueError, match="channels must be distinct, got 1 more than once"):
        channel_adapter(**call)


@pytest.mark.parametrize("impl", CASE.op.impls)
def test_an_implementation_that_cannot_run_the_device(impl):
    call = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in good().items()}
    if impl == "reference":
        assert channel_adapter(**call, impl=impl).device.type == "meta"
        return
    with pytest.raises(RuntimeError, match=f"^channel_adapter: impl='{impl}' cannot run this call: .*meta"):
        channel_adapter(**call, impl=impl)


def test_good_input_passes():
    assert channel_adapter(**good()).shape == (N, D)
    assert channel_adapter(**good(scale=2, bias=None)).shape == (N, D)
    assert channel_adapter(**good(x=t(D))).shape == (D,)
    none = dict(channels=of([]).long(), weight=t(0, 0), bias=t(0))
    for impl in impls(CASE):
        assert channel_adapter(**good(**none, x=t(N, 0)), impl=impl).shape == (N, 0)
        strided = good(channels=of([6, 9, 1, 9, 3, 9, 0, 9])[::2], weight=torch.eye(K), x=torch.ones(N, D))
        assert channel_adapter(**strided, impl=impl)[0].tolist() == [2, 2, 1, 2, 1, 1, 2, 1]


def dense(x, channels, weight, bias, scale, scale_input):
    """x T^T + e with the d x d matrix T = I + s E A E^T, e = s E b; with scale_input T = I + E (A + (s - 1) I) E^T."""
    d, k = x.shape[-1], len(channels)
    columns = torch.eye(d, dtype=x.dtype)[:, channels]  # E
    a = weight + (scale - 1) * torch.eye(k, dtype=x.dtype) if scale_input else scale * weight
    matrix = torch.eye(d, dtype=x.dtype) + columns @ a @ columns.T
    shift = 0 if bias is None else columns @ (bias if scale_input else scale * bias)
    return x @ matrix.T + shift


@pytest.mark.parametrize("impl", impls(CASE))
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("scale", [0.4, (1,), ()], ids=str)
@pytest.mark.parametrize("size", [(37, 48, 6), (9, 40, 40), (130, 64, 1)], ids=str)
def test_the_dense_formula(impl, scale, scale_input, size):
    n, d, k = size
    dtype = torch.float64 if torch.float64 in DTYPES[impl] else torch.float32
    call = CASE.inputs(dict(n=n, d=d, k=k, scale=scale, scale_input=scale_input, shuffled=True), dtype)
    ours = run(channel_adapter, call, impl=impl)
    exact = run(dense, call)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for (name, got), (_, wanted) in zip(ours.items(), exact.items(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("impl", kernels(CASE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [48, 70])
def test_other_channels_keep_every_bit(impl, dtype, d):
    """Payloads of NaN, denormals and negative zero included: the copy is one of bits."""
    generator = torch.Generator().manual_seed(0)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (33, d), generator=generator).to(integer)
    channels = torch.tensor([5, 40, 2])
    others = [c for c in range(d) if c not in channels]
    bits[0, others] = torch.tensor(info.min, dtype=integer)  # -0
    bits[1, others] = torch.tensor(-1, dtype=integer)  # a NaN with every bit of its payload
    bits[2, others] = torch.tensor(0x7F800001 if dtype == torch.float32 else 0x7C01, dtype=integer)  # fp: signalling
    x = bits.view(dtype)
    y = channel_adapter(x, channels, torch.ones(3, 3, dtype=dtype), None, impl=impl)
    assert torch.equal(y.view(integer)[:, others], bits[:, others])
    assert torch.equal(x.view(integer), bits)  # and x is not written to


@pytest.mark.parametrize("impl", impls(CASE))
def test_what_is_saved(impl):
    """x_C [n, k], never x [n, d]; and not even that where neither weight nor scale trains."""
    if impl == "reference":
        return
    n, d, k = 64, 96, 8
    for frozen, expected in (((), n * k), (("weight",), n * k), (("weight", "scale"), 0)):
        call = arguments(CASE.inputs(dict(n=n, d=d, k=k, scale=(1,), frozen=frozen)))
        own = {v.data_ptr() for v in call.values() if isinstance(v, torch.Tensor)}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):  # noqa: B023
            channel_adapter(**call, impl=impl)
        assert sum(s.numel() for s in saved if s.data_ptr() not in own) == expected
        assert call["x"].data_ptr() not in {s.data_ptr() for s in saved}


@pytest.mark.skipif("cpp" not in kernels(CASE), reason="of the C++ kernels")
def test_the_gradient_of_an_input_scale_is_rounded_once():
    """A sum of n k terms of either sign, 480,000 here, that nearly cancel; in float32 it lost 1e-4 of 66."""
    call = CASE.inputs(dict(n=5000, d=300, k=96, scale=(1,), scale_input=True))
    got = run(channel_adapter, call, impl="cpp").grads["scale"].double()
    exact = run(channel_adapter, in_float64(call), impl="reference").grads["scale"]
    assert (got - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()
