"""`adapter_norm` and `norm_adapter`: bad input, rows far from zero, what is saved, the forms of the sum."""

from __future__ import annotations

import pytest
import torch
from table import check_refused, device, kernels, marks

from petl_kernels import adapter_norm, norm_adapter
from petl_kernels.testing import CASES, arguments, check

N, D, R = 3, 8, 2
t = torch.zeros
SITES = {case.name: case for case in CASES if case.name in ("adapter_norm", "norm_adapter")}
KERNELS = [
    pytest.param(case, impl, id=f"{case.name}-{impl}", marks=marks(impl))
    for case in SITES.values()
    for impl in kernels(case)
]


def good(fn, **changed):
    call = dict(x=t(N, D), residual=t(N, D), w_down=t(R, D), b_down=t(R), w_up=t(D, R), b_up=t(D))
    return call | dict(ln_weight=t(D), ln_bias=t(D), eps=1e-5, activation="gelu", scale=1.0, norm="layer") | changed


BOTH = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[\.\.\., d_in\] with at least one dimension"),
    "w_down-width": (dict(w_down=t(R, 9)), ValueError, r"w_down must be \[r, d_in\] with d_in = 8 .*, got \[2, 9\]"),
    "w_up-rank": (dict(w_up=t(D, 3)), ValueError, r"w_up must be \[d_out, r\] with r = 2 .*, got \[8, 3\]"),
    "w_up-dtype": (
        dict(w_up=t(D, R).half()),
        TypeError,
        "w_up must have w_down's dtype torch.float32, got torch.float16",
    ),
    "no-rank": (dict(w_down=t(0, D), w_up=t(D, 0)), ValueError, "d_in, r and d_out must be at least 1"),
    "b_down-length": (dict(b_down=t(3)), ValueError, r"b_down must be \[r\] = \[2\], got \[3\]"),
    "b_up-device": (dict(b_up=t(D, device="meta")), ValueError, "b_up must be on x's device cpu, got meta"),
    "activation": (dict(activation="mish"), ValueError, "activation must be one of .* got 'mish'"),
    "scale": (dict(scale=t(2)), ValueError, r"scale must be a float, \[\], \[1\] or \[d_out\] = \[8\], got \[2\]"),
    "residual": (dict(residual=t(N, 9)), ValueError, r"residual must be \[\.\.\., d_out\] = \[3, 8\], got \[3, 9\]"),
    "ln_weight": (dict(ln_weight=t(9)), ValueError, r"ln_weight must be \[d\] = \[8\], got \[9\]"),
    "ln_bias-dtype": (dict(ln_bias=t(D).half()), TypeError, "ln_bias must have ln_weight's dtype torch.float32"),
    "ln_weight-float64": (
        dict(ln_weight=t(D).double()),
        TypeError,
        "ln_weight is torch.float64 beside x of torch.float32",
    ),
    "norm": (dict(norm="batch"), ValueError, r"norm must be one of \('layer', 'rms'\), got 'batch'"),
    "rms-bias": (dict(norm="rms"), ValueError, "ln_bias must be None with norm='rms'"),
    "eps-type": (dict(eps="small"), TypeError, "eps must be a float, got str"),
    "eps-negative": (dict(eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("fn", [adapter_norm, norm_adapter], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("changed, error, message", BOTH.values(), ids=BOTH)
def test_bad_input(fn, changed, error, message):
    check_refused(fn, good(fn, **changed), error, message)


def test_bad_terms():
    check_refused(adapter_norm, good(adapter_norm, hidden=t(9, D)), ValueError, r"hidden must be .* got \[9, 8\]")
    wide = good(adapter_norm, w_up=t(9, R), b_up=t(9), residual=None)
    check_refused(adapter_norm, wide, ValueError, "w_up must be .* d = 8 where x is a term of the sum, got 9 rows")


@pytest.mark.parametrize("case, impl", KERNELS)
def test_an_implementation_that_cannot_run_the_device(case, impl):
    call = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in good(case.fn).items()}
    with pytest.raises(RuntimeError, match=f"^{case.name}: impl='{impl}' cannot run this call: .*meta"):
        case.fn(**call, impl=impl)
    assert case.fn(**call).shape == (N, D)


@pytest.mark.parametrize("case, impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_from_zero(case, impl, dtype):
    """With a mean of ten thousand standard deviations float32 keeps three digits: no fewer than eager may be left.

    A layer norm in bfloat16 of a hundred: its eight bits leave eager nothing of a row farther off, 32 being half a unit
    in the last place of ten thousand.
    """
    if impl == "triton":
        pytest.importorskip("triton")
    far = "x_mean" if case.name == "norm_adapter" else "residual_mean"
    for seed, sample in enumerate((dict(d=768, r=16), dict(d=96, r=4), dict(d=1000, r=8, norm="rms"))):
        mean = 1e4 if dtype == torch.float32 or "norm" in sample else 100.0
        call = case.inputs({"n": 16, **sample, far: (-1) ** seed * mean}, dtype, device=device(impl), seed=seed)
        assert check(case, call, impl=impl) == []


def test_parallel_is_the_sequential_form_with_its_terms_exchanged():
    call = arguments(SITES["adapter_norm"].inputs(dict(n=5, d=12, r=3, hidden="other")))
    x = call["residual"]
    exchanged = {**call, "x": x, "residual": call["hidden"], "hidden": None}
    for impl in ("reference", "cpp"):
        apart = adapter_norm(**{**call, "x": x}, impl=impl)
        torch.testing.assert_close(apart, adapter_norm(**exchanged, impl=impl))


SAVED = {
    "sequential": ({}, {"x"}, {"x", "residual"}),
    "parallel-frozen-down": (dict(hidden="other", frozen=("w_down",)), set(), {"residual", "hidden"}),
    "frozen": (dict(frozen="all"), set(), set()),
}


@pytest.mark.parametrize("impl", [pytest.param(i, marks=marks(i)) for i in kernels(SITES["adapter_norm"])])
@pytest.mark.parametrize("options, beside_normal, formed_again", SAVED.values(), ids=SAVED)
def test_only_what_the_backward_reads_is_saved(options, beside_normal, formed_again, impl):
    """Of the size of x two tensors: x, and the normalised rows (C++, CUDA) or the other term of the sum (Triton)."""
    case = SITES["adapter_norm"]
    trains = options.get("frozen") != "all"
    if not trains:
        options = dict(frozen=tuple(case.inputs(case.typical)))
    call = arguments(case.inputs(dict(n=N, d=D, r=R, **options), device=device(impl)))
    given = {v.data_ptr(): name for name, v in call.items() if isinstance(v, torch.Tensor)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        adapter_norm(**call, impl=impl)
    kept = {given[v.data_ptr()] for v in saved if v.shape == (N, D) and v.data_ptr() in given}
    stored = impl != "triton"
    assert kept == (beside_normal if stored else formed_again)
    made = sum(v.numel() for v in saved if v.data_ptr() not in given)
    assert made == trains * (N * R + (N + N * D if stored else 2 * N))
