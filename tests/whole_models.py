"""The rule of `petl_kernels.testing.judge` for whole models."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from petl_kernels.testing import Error, Outcome, mean_errors

SEEDS = range(3, 11)  # of the draws of a model's weights
TYPICAL = 1.25  # what the ratio of the two errors may be in the geometric mean over a model's tensors


def worse(ours: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]) -> str | None:
    """How the model's errors exceed those of eager PyTorch, or None; each has an outcome per draw of its weights.

    Two bounds on the means over the draws. Of each tensor, that of `judge`: twice eager's error plus one unit in the
    last place. What arrives after two blocks at a bias of four elements is a single draw of all rounding before it,
    eager's as well: over twelve draws the ratio of the two errors goes from 0.4 to 2.9 about a median of 1. And of the
    model, because errors that come from another formula come everywhere: the ratios' geometric mean over its tensors.

    A tensor that cancels to less than its own error, as a saturated gate's gradient does in bfloat16, says nothing by
    itself: it still counts in the second bound, and half of the tensors must not be of this kind.
    """
    for outcomes in zip(ours, eager, exact, strict=True):
        _assert_alike(*outcomes)
    found = mean_errors(ours, eager, exact)
    telling = [e for e in found if e.bound < e.largest]
    assert 2 * len(telling) >= len(found), f"vacuous: zeros would pass in {len(found) - len(telling)} of {len(found)}"
    if failures := [e for e in found if not e.ours <= e.bound]:
        worst = max(failures, key=lambda e: e.ours / e.bound)
        return f"{len(failures)} tensors, {worst.name}: error {worst.ours:.3g}, eager's {worst.eager:.3g}"
    ratio = geometric_mean(map(_ratio, found))
    return None if ratio <= TYPICAL else f"errors are {ratio:.3g} times eager's"


def _ratio(e: Error) -> float:
    """Of the two errors; half a unit in the last place, which rounding the result costs anyone, is added to both."""
    return (e.ours + e.floor / 2) / (e.eager + e.floor / 2) if e.floor else 1.0


def _assert_alike(ours: Outcome, eager: Outcome, exact: Outcome) -> None:
    assert ours.grads.keys() == eager.grads.keys() == exact.grads.keys() and exact.grads
    for (name, got), (_, same), (_, true) in zip(ours.items(), eager.items(), exact.items(), strict=True):
        assert got.dtype == same.dtype and got.shape == true.shape, name
        assert (got.count_nonzero() > 0) == (true.count_nonzero() > 0), name
