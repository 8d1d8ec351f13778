"""The rule of `petl_kernels.testing.judge` for whole models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petl_kernels.testing import Outcome


def worse(ours: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]) -> str | None:
    """How the model's error exceeds twice that of eager PyTorch plus one unit in the last place, or None.

    Each has an outcome per draw of the model's weights. The error of one is the largest of its tensors', relative to
    their largest elements; of the draws the mean counts. What arrives after two blocks at a bias of four elements is a
    single draw of all rounding before it, eager's as well: over twelve draws the two errors' ratio goes from 0.4 to 2.9
    about a median of 1, of kernels that `judge` passes one by one.
    """
    found, wanted = (
        sum(_error(*three) for three in zip(outcomes, eager, exact, strict=True)) / len(exact)
        for outcomes in (ours, eager)
    )
    ulps = 64 if eager[0].output.dtype == torch.float64 else 1  # as `judge` has it
    bound = 2 * wanted + ulps * torch.finfo(eager[0].output.dtype).eps
    assert bound < 1, "vacuous: zeros would pass"
    return None if found <= bound else f"error {found:.3g}, eager's {wanted:.3g}"


def _error(outcome: Outcome, eager: Outcome, exact: Outcome) -> float:
    assert outcome.grads.keys() == eager.grads.keys() == exact.grads.keys() and exact.grads
    # A gate's gradient, a sum that cancels to 1e-4 of what is summed, has the error of its terms.
    least = max(true.abs().max().item() for true in exact.grads.values()) / 100
    largest = 0.0
    for (name, got), (_, same), (_, true) in zip(outcome.items(), eager.items(), exact.items(), strict=True):
        assert got.dtype == same.dtype and got.shape == true.shape, name
        assert (got.count_nonzero() > 0) == (true.count_nonzero() > 0), name
        largest = max(largest, (got.double() - true).abs().max().item() / max(true.abs().max().item(), least))
    return largest
