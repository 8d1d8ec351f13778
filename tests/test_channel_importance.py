"""`channel_importance`: bad input, and what its scores mean."""

from __future__ import annotations

import pytest
import torch
from table import check_refused

from petl_kernels import channel_importance
from petl_kernels.ops.channel_importance import OP

N, D = 3, 8
t = torch.zeros


def good(**changed):
    return dict(activation=t(N, D), grad=t(N, D)) | changed


BAD = {
    "activation-list": (dict(activation=[1.0]), TypeError, "activation must be a tensor, got list"),
    "activation-integer": (dict(activation=t(N, D).long()), TypeError, "activation must be float32, .* torch.int64"),
    "activation-rank": (
        dict(activation=t(()), grad=t(())),
        ValueError,
        r"activation must be \[..., d\] with d at least 1, got \[\]",
    ),
    "activation-empty-rows": (dict(activation=t(N, 0), grad=t(N, 0)), ValueError, r"d at least 1, got \[3, 0\]"),
    "grad-none": (dict(grad=None), TypeError, "grad must be a tensor, got NoneType"),
    "grad-complex": (dict(grad=t(N, D, dtype=torch.complex64)), TypeError, "grad must be float32, .* torch.complex64"),
    "grad-shape": (dict(grad=t(N, D + 1)), ValueError, r"grad must be activation's shape .* = \[3, 8\], got \[3, 9\]"),
    "grad-broadcast": (dict(grad=t(D)), ValueError, r"grad must be activation's shape .* = \[3, 8\], got \[8\]"),
    "grad-device": (dict(grad=t(N, D, device="meta")), ValueError, "grad must be on activation's device cpu, got meta"),
    "grad-float64": (
        dict(grad=t(N, D).double()),
        TypeError,
        "grad is torch.float64 beside activation of torch.float32",
    ),
    "reduction": (dict(reduction="l2"), ValueError, r"reduction must be one of \('sq_batch', .*\), got 'l2'"),
    "reduction-none": (dict(reduction=None), ValueError, "reduction must be one of .*, got None"),
    "impl": (dict(impl="fast"), ValueError, r"impl must be one of \('auto', 'reference', .*\), got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    check_refused(channel_importance, good(**changed), error, message)


@pytest.mark.parametrize("impl", [name for name in OP.impls if name != "reference"])
def test_an_implementation_that_cannot_run_the_device(impl):
    call = {name: value.to("meta") for name, value in good().items()}
    with pytest.raises(RuntimeError, match=f"^channel_importance: impl='{impl}' cannot run this call: .*meta"):
        channel_importance(**call, impl=impl)
    assert channel_importance(**call).shape == (D,)


def activations(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, tokens, D, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_a_score_is_the_square_of_a_gates_gradient(impl):
    """Multiplying the channels by a gate of ones and differentiating in the gate gives the sums that are squared."""
    activation, weight = activations(4, 7)
    gate = torch.ones(D, dtype=torch.float64, requires_grad=True)
    activation.requires_grad_()
    gated = activation * gate
    loss = (gated.tanh() * weight).sum()
    grad, in_gated = torch.autograd.grad(loss, (gate, gated))
    scores = channel_importance(activation, in_gated, impl=impl)
    torch.testing.assert_close(scores, grad.square())
    # Sample by sample the gate of each has its own gradient.
    per_sample = torch.stack([channel_importance(a, g, impl=impl) for a, g in zip(activation, in_gated)])
    torch.testing.assert_close(
        channel_importance(activation, in_gated, reduction="sq_sample", impl=impl), per_sample.sum(0)
    )


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("reduction", ["sq_sample", "abs"])
def test_scores_of_batches_add_up(impl, reduction):
    activation, grad = activations(6, 5)
    parts = (
        channel_importance(a, g, reduction=reduction, impl=impl) for a, g in zip(activation.split(2), grad.split(2))
    )
    torch.testing.assert_close(sum(parts), channel_importance(activation, grad, reduction=reduction, impl=impl))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_each_row_of_a_matrix_is_a_sample(impl):
    activation, grad = (v[:, 0] for v in activations(6, 1))
    scores = channel_importance(activation, grad, reduction="sq_sample", impl=impl)
    torch.testing.assert_close(scores, (activation * grad).square().sum(0))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["eager", "compiled"])
def test_the_result_has_no_gradient(impl, wrapped):
    activation, grad = (v.requires_grad_() for v in activations(2, 3))
    fn = torch.compile(channel_importance, backend="aot_eager", fullgraph=True) if wrapped else channel_importance
    assert not fn(activation, grad, impl=impl).requires_grad


def test_a_sum_over_many_rows_does_not_drift():
    """A million equal products: a running float32 sum would stop growing at 2^24 and lose digits before."""
    n = 1_000_003
    ones = torch.full((n, 2), 1.1)
    exact = torch.tensor(1.1).double().square().item() * n
    scores = channel_importance(ones, ones, reduction="abs", impl="cpp")
    assert (scores.double() / exact - 1).abs().max() < 1e-6
