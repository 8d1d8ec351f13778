"""The gradients that a backward returns, before they are computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def new_gradients(parameters: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Memory for the gradient of each parameter; where none is needed an empty tensor of the dtype of `like`."""
    return [
        like.new_empty((0,)) if p is None or not need else p.new_empty(p.shape) for p, need in zip(parameters, needs)
    ]
