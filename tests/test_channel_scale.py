"""`channel_scale`: bad input, what is saved, autocast, one rounding, widths of which not a vector is whole."""

from __future__ import annotations

import pytest
import torch
from table import check_refused

from petl_kernels import channel_scale, explain
from petl_kernels.ops.channel_scale import FORWARD, OP
from petl_kernels.testing import CASES, arguments, check, run

N, D = 3, 8
CASE = next(case for case in CASES if case.name == "channel_scale")
t = torch.zeros


def good(**changed):
    return dict(x=t(N, D), scale=torch.ones(D)) | changed


BAD = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-integer": (dict(x=t(N, D).long()), TypeError, "x must be float32, .* got torch.int64"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[..., d\] with d at least 1, got \[\]"),
    "x-empty-rows": (dict(x=t(N, 0), scale=t(0)), ValueError, r"d at least 1, got \[3, 0\]"),
    "scale-none": (dict(scale=None), TypeError, "scale must be a tensor, got NoneType"),
    "scale-float": (dict(scale=2.0), TypeError, "scale must be a tensor, got float"),
    "scale-length": (dict(scale=t(D + 1)), ValueError, r"scale must be \[d\] = \[8\], got \[9\]"),
    "scale-one": (dict(scale=t(1)), ValueError, r"scale must be \[d\] = \[8\], got \[1\]"),
    "scale-rank": (dict(scale=t(1, D)), ValueError, r"scale must be \[d\] = \[8\], got \[1, 8\]"),
    "scale-integer": (dict(scale=t(D).int()), TypeError, "scale must be float32, .* got torch.int32"),
    "scale-float64": (dict(scale=t(D).double()), TypeError, "scale is torch.float64 beside x of torch.float32"),
    "scale-device": (dict(scale=t(D, device="meta")), ValueError, "scale must be on x's device cpu, got meta"),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(channel_scale, good(**changed), error, message)


@pytest.mark.parametrize("impl", [name for name in OP.impls if name != "reference"])
def test_an_implementation_that_cannot_run_the_device(impl):
    call = {name: v.to("meta") for name, v in good().items()}
    with pytest.raises(RuntimeError, match=f"^channel_scale: impl='{impl}' cannot run this call: .*meta"):
        channel_scale(**call, impl=impl)
    assert channel_scale(**call).shape == (N, D)


@pytest.mark.parametrize("frozen, kept", [(("scale",), False), (("x",), True), ((), True)], ids=str)
def test_x_is_saved_only_for_the_gradient_of_scale(frozen, kept):
    call = CASE.inputs(dict(n=N, d=D, frozen=frozen))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        channel_scale(**arguments(call), impl="cpp")
    assert any(v.shape == (N, D) for v in saved) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_the_cpu_casts_x_and_not_the_scale(dtype):
    x, scale = torch.randn(N, D, dtype=dtype), torch.randn(D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = channel_scale(x, scale, impl="cpp")
    assert torch.equal(y, channel_scale(x.bfloat16(), scale, impl="cpp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_scale_is_not_rounded_first(dtype):
    x, scale = torch.randn(257, 96).to(dtype), torch.randn(96)
    wanted = (x.float() * scale).to(dtype)
    assert not torch.equal(wanted, x * scale.to(dtype))
    assert torch.equal(channel_scale(x, scale, impl="cpp"), wanted)
    assert torch.equal(channel_scale(x, scale, impl="reference"), wanted)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_narrow_rows_of_small_integers_are_exact(impl, d):
    if impl == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    x, scale, g = (torch.randint(-4, 5, shape).float() for shape in ((70, d), (d,), (70, d)))
    leaves = (x.requires_grad_(), scale.requires_grad_())
    ours, theirs = (channel_scale(x, scale, impl=name) for name in (impl, "reference"))
    assert torch.equal(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, leaves, g) for y in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


def test_two_threads_leave_the_same_bits_in_ten_runs():
    """Over enough rows for a second thread, unlike the calls of the table."""
    call = CASE.inputs(dict(n=5000, d=96))
    runs = [run(channel_scale, call, impl="cpp").items() for _ in range(10)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_a_scale_with_gaps(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    call = CASE.inputs(dict(n=19, d=48))
    call["scale"] = torch.randn(96)[::2].requires_grad_()
    assert check(CASE, call, impl=impl) == []


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "dtype, of_scale, trains, rows",
    [(FP32, FP32, True, 1024), (FP32, FP32, False, 8192), (BF16, BF16, False, 512), (BF16, FP32, True, 64)],
)
def test_auto_leaves_small_calls_to_torch(dtype, of_scale, trains, rows):
    x, scale = t(rows, 1024, dtype=dtype), torch.ones(1024, dtype=of_scale, requires_grad=trains)
    assert explain(channel_scale, x[1:], scale).chosen == "reference"
    assert explain(channel_scale, x, scale).chosen == "cpp"


@pytest.mark.parametrize("impl", [None, "cpp"])
def test_auto_leaves_compiled_calls_to_the_compiler(impl):
    targets = set()

    def backend(graph, inputs):
        targets.update(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(channel_scale, fullgraph=True, backend=backend)(t(1024, 1024, dtype=BF16), t(1024), impl=impl)
    assert (FORWARD.overload in targets) == (impl == "cpp")
