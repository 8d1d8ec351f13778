"""`layer_norm`: bad input, rows far from zero, autocast; and the module over it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from table import Recorder, check_refused

from petl_kernels import explain, layer_norm, nn, use_impl
from petl_kernels.ops.layer_norm import OP
from petl_kernels.testing import CASES, arguments, check

N, D = 3, 8
CASE = next(case for case in CASES if case.name == "layer_norm")
t = torch.zeros


def good(**changed):
    return dict(x=t(N, D), weight=torch.ones(D), bias=t(D), eps=1e-5) | changed


BAD = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-integer": (dict(x=t(N, D).long()), TypeError, "x must be float32, .* got torch.int64"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[..., d\] with d at least 1, got \[\]"),
    "x-empty-rows": (dict(x=t(N, 0), weight=t(0), bias=t(0)), ValueError, r"d at least 1, got \[3, 0\]"),
    "weight-length": (dict(weight=t(D + 1)), ValueError, r"weight must be \[d\] = \[8\], got \[9\]"),
    "weight-rank": (dict(weight=t(1, D)), ValueError, r"weight must be \[d\] = \[8\], got \[1, 8\]"),
    "weight-float": (dict(weight=1.0), TypeError, "weight must be a tensor, got float"),
    "weight-integer": (dict(weight=t(D).int()), TypeError, "weight must be float32, .* got torch.int32"),
    "weight-float64": (dict(weight=t(D).double()), TypeError, "weight is torch.float64 beside x of torch.float32"),
    "weight-device": (dict(weight=t(D, device="meta")), ValueError, "weight must be on x's device cpu, got meta"),
    "bias-length": (dict(bias=t(1)), ValueError, r"bias must be \[d\] = \[8\], got \[1\]"),
    "bias-dtype": (dict(bias=t(D).half()), TypeError, "bias must have weight's dtype torch.float32, got torch.float16"),
    "bias-device": (dict(bias=t(D, device="meta")), ValueError, "bias must be on x's device cpu, got meta"),
    "eps-string": (dict(eps="small"), TypeError, "eps must be a float, got str"),
    "eps-none": (dict(eps=None), TypeError, "eps must be a float, got NoneType"),
    "eps-bool": (dict(eps=True), TypeError, "eps must be a float, got bool"),
    "eps-negative": (dict(eps=-1e-5), ValueError, "eps must be at least 0, got -1e-05"),
    "eps-nan": (dict(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(layer_norm, good(**changed), error, message)


@pytest.mark.parametrize("impl", [name for name in OP.impls if name != "reference"])
def test_an_implementation_that_cannot_run_the_device(impl):
    call = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in good().items()}
    with pytest.raises(RuntimeError, match=f"^layer_norm: impl='{impl}' cannot run this call: .*meta"):
        layer_norm(**call, impl=impl)
    assert layer_norm(**call).shape == (N, D)


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize("offset", [100.0, 1e4, -1e4])
@pytest.mark.parametrize("d", [96, 768, 1000])
def test_rows_far_from_zero(impl, offset, d):
    """With a mean of ten thousand standard deviations float32 keeps three digits: no fewer than eager may be left."""
    if impl == "triton":
        pytest.importorskip("triton")
    for seed in range(3):
        call = CASE.inputs(dict(n=40, d=d, offset=offset, std=1.0), seed=seed)
        assert check(CASE, call, impl=impl) == []


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_what_the_rounded_mean_lacks_is_taken_off(impl):
    """Half a unit in the last place of 1e4 is 5e-4, which eager's rows are off by, too."""
    if impl == "triton":
        pytest.importorskip("triton")
    x = 1e4 + torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    assert layer_norm(x, torch.ones(96), t(96), 1e-5, impl=impl).double().mean(1).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_the_cpu_does_what_torch_does(dtype):
    x, weight, bias = torch.randn(N, D, dtype=dtype), torch.ones(D, dtype=dtype), t(D, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer_norm(x, weight, bias, impl="cpp"), F.layer_norm(x, (D,), weight, bias)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen, kept", [(("x", "weight"), False), (("x",), True), ((), True)], ids=str)
def test_only_what_the_backward_reads_is_saved(frozen, kept):
    """With only the shift training neither x nor its statistics are."""
    call = CASE.inputs(dict(n=N, d=D, frozen=frozen))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        layer_norm(**arguments(call), impl="cpp")
    assert any(v.shape == (N, D) for v in saved) == kept
    assert any(v.shape == (N,) for v in saved) == kept


def modules(*args, **kwargs):
    torch.manual_seed(0)
    theirs = torch.nn.LayerNorm(*args, **kwargs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = nn.LayerNorm(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(elementwise_affine=False), dict(eps=0.1)], ids=str)
def test_module_is_torchs(options):
    ours, theirs = modules(D, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    x = torch.randn(2, N, D, requires_grad=True)
    results = []
    with use_impl("cpp"):
        for module in (ours, theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            y = module(x)
            leaves = [x, *module.parameters()]
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_module_calls_the_op_for_one_dimension_only():
    for shape, calls in (((D,), 1), ((N, D), 0)):
        ours, theirs = modules(shape)
        x = torch.randn(2, N, D)
        with Recorder() as recorder, use_impl("cpp"), torch.no_grad():
            y = ours(x)
        assert len(recorder.calls) == calls
        torch.testing.assert_close(y, theirs(x))


def test_module_refuses_a_width_that_does_not_fit_as_torch_does():
    ours, theirs = modules(D)
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            module(torch.randn(2, D + 1))


def test_auto_leaves_small_calls_to_torch():
    """Below 2^18 elements, and 2^23 in float32, torch's own is the faster one."""
    for n, dtype in ((256, torch.bfloat16), (8192, torch.float32)):
        x = torch.zeros(n, 1024, dtype=dtype)
        assert explain(layer_norm, x[1:], None, None).chosen == "reference"
        assert explain(layer_norm, x, None, None).chosen == "cpp"
