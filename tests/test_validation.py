"""Bad input of `bottleneck_adapter`: an error that names op, argument, got and wanted, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from table import check_refused

from petl_kernels import bottleneck_adapter
from petl_kernels.testing import CASES

N, D, R = 3, 8, 4


def good(**changed):
    call = dict(
        x=torch.zeros(N, D),
        w_down=torch.zeros(R, D),
        b_down=torch.zeros(R),
        w_up=torch.zeros(D, R),
        b_up=torch.zeros(D),
        residual=torch.zeros(N, D),
        scale=torch.ones(D),
    )
    return call | changed


t = torch.zeros
BAD = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-none": (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    "x-integer": (dict(x=t(N, D, dtype=torch.long)), TypeError, "x must be float32, .* got torch.int64"),
    "x-complex": (dict(x=t(N, D, dtype=torch.complex64)), TypeError, "x must be float32, .* got torch.complex64"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[..., d_in\] .* got a 0-dim tensor"),
    "x-width": (dict(x=t(N, D + 1)), ValueError, r"w_down must be \[r, d_in\] with d_in = 9 .* got \[4, 8\]"),
    "w_down-rank": (dict(w_down=t(R)), ValueError, r"w_down must be \[r, d_in\] .* got \[4\]"),
    "w_down-none": (dict(w_down=None), TypeError, "w_down must be a tensor, got NoneType"),
    "w_down-transposed": (dict(w_down=t(D, R)), ValueError, r"w_down must be \[r, d_in\] .* got \[8, 4\]"),
    "w_down-empty": (
        dict(w_down=t(0, D), b_down=t(0), w_up=t(D, 0)),
        ValueError,
        r"must be at least 1, got .*\[0, 8\]",
    ),
    "w_down-integer": (dict(w_down=t(R, D, dtype=torch.int8)), TypeError, "w_down must be float32, .* got torch.int8"),
    "w_down-float64": (dict(w_down=t(R, D, dtype=torch.float64)), TypeError, "w_down is torch.float64 beside x of"),
    "w_down-device": (dict(w_down=t(R, D, device="meta")), ValueError, "w_down must be on x's device cpu, got meta"),
    "w_up-rank": (dict(w_up=t(D, R, 1)), ValueError, r"w_up must be \[d_out, r\] .* got \[8, 4, 1\]"),
    "w_up-width": (dict(w_up=t(D, R + 1)), ValueError, r"w_up must be \[d_out, r\] with r = 4 .* got \[8, 5\]"),
    "w_up-dtype": (
        dict(w_up=t(D, R).half()),
        TypeError,
        "w_up must have w_down's dtype torch.float32, got torch.float16",
    ),
    "b_down-length": (dict(b_down=t(R + 1)), ValueError, r"b_down must be \[r\] = \[4\], got \[5\]"),
    "b_down-rank": (dict(b_down=t(1, R)), ValueError, r"b_down must be \[r\] = \[4\], got \[1, 4\]"),
    "b_down-dtype": (
        dict(b_down=t(R).half()),
        TypeError,
        "b_down must have the dtype of its weight, .* got torch.float16",
    ),
    "b_up-length": (dict(b_up=t(R)), ValueError, r"b_up must be \[d_out\] = \[8\], got \[4\]"),
    "b_up-device": (dict(b_up=t(D, device="meta")), ValueError, "b_up must be on x's device cpu, got meta"),
    "residual-shape": (
        dict(residual=t(N, D + 1)),
        ValueError,
        r"residual must be \[..., d_out\] = \[3, 8\], got \[3, 9\]",
    ),
    "residual-broadcast": (dict(residual=t(D)), ValueError, r"residual must be \[..., d_out\] = \[3, 8\], got \[8\]"),
    "residual-float": (dict(residual=1.0), TypeError, "residual must be a tensor, got float"),
    "residual-device": (
        dict(residual=t(N, D, device="meta")),
        ValueError,
        "residual must be on x's device cpu, got meta",
    ),
    "activation": (dict(activation="swish"), ValueError, r"activation must be one of \('relu', .*\), got 'swish'"),
    "activation-none": (dict(activation=None), ValueError, "activation must be one of .*, got None"),
    "scale-shape": (
        dict(scale=t(R)),
        ValueError,
        r"scale must be a float, \[\], \[1\] or \[d_out\] = \[8\], got \[4\]",
    ),
    "scale-string": (dict(scale="learned"), TypeError, "scale must be a float or a tensor, got str"),
    "scale-bool": (dict(scale=True), TypeError, "scale must be a float or a tensor, got bool"),
    "scale-none": (dict(scale=None), TypeError, "scale must be a float or a tensor, got NoneType"),
    "scale-integer": (dict(scale=t((), dtype=torch.long)), TypeError, "scale must be float32, .* got torch.int64"),
    "scale-device": (dict(scale=t(D, device="meta")), ValueError, "scale must be on x's device cpu, got meta"),
    "gate-shape": (dict(gate=t(2, 1)), ValueError, r"gate must broadcast to \[..., 1\] = \[3, 1\], got \[2, 1\]"),
    "gate-vector": (dict(gate=t(N)), ValueError, r"gate must broadcast to \[..., 1\] = \[3, 1\], got \[3\]"),
    "gate-rank": (dict(gate=t(1, N, 1)), ValueError, r"gate must broadcast to .* got \[1, 3, 1\]"),
    "gate-float": (dict(gate=0.5), TypeError, "gate must be a tensor, got float"),
    "gate-device": (dict(gate=t(N, 1, device="meta")), ValueError, "gate must be on x's device cpu, got meta"),
    "dropout-one": (dict(dropout=1.0), ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
    "dropout-negative": (dict(dropout=-0.1), ValueError, r"dropout must be a probability in \[0, 1\), got -0.1"),
    "dropout-bool": (dict(dropout=True), ValueError, r"dropout must be a probability in \[0, 1\), got True"),
    "dropout-none": (dict(dropout=None), ValueError, r"dropout must be a probability in \[0, 1\), got None"),
    "seed-int": (dict(dropout=0.1, seed=7), TypeError, r"seed must be an int64 tensor \[\] or \[1\], got 7"),
    "seed-float": (dict(dropout=0.1, seed=t(1)), TypeError, r"seed must be an int64 tensor .* got torch.float32 \[1\]"),
    "seed-two": (
        dict(dropout=0.1, seed=t(2, dtype=torch.long)),
        TypeError,
        r"seed must be an int64 tensor .* got torch.int64 \[2\]",
    ),
    "seed-device": (
        dict(dropout=0.1, seed=t(1, dtype=torch.long, device="meta")),
        ValueError,
        "seed must be on x's device cpu, got meta",
    ),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(bottleneck_adapter, good(**changed), error, message)


@pytest.mark.parametrize("impl", CASES[0].op.impls)
def test_an_implementation_that_cannot_run_the_device(impl):
    call = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in good().items()}
    if impl == "reference":
        assert bottleneck_adapter(**call, impl=impl).device.type == "meta"
        return
    with pytest.raises(RuntimeError, match=f"^bottleneck_adapter: impl='{impl}' cannot run this call: .*meta"):
        bottleneck_adapter(**call, impl=impl)


def test_good_input_passes():
    assert bottleneck_adapter(**good()).shape == (N, D)
    assert bottleneck_adapter(**good(scale=2)).shape == (N, D)
    assert bottleneck_adapter(**good(x=t(D), residual=None)).shape == (D,)
