"""The refusal of a second differentiation, in our own words instead of a foreign message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{ctx.name}: double backward is not implemented by the kernels; use impl='reference'")


def differentiable_once(
    name: str, gradients: Callable[[], Sequence[Tensor | None]], inputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """What `gradients` computes inside a backward, with a node attached that raises on a second differentiation.

    Only `create_graph=True` leaves gradients enabled there, and differentiating once under it stays legal: the node
    raises when the result is differentiated with respect to any of `inputs`.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients()
    with torch.no_grad():
        grads = gradients()
    present = [t for t in grads if t is not None]
    anchors = [t for t in inputs if t is not None]
    guarded = iter(_FirstOrderOnly.apply(name, len(present), *present, *anchors))
    return [None if t is None else next(guarded) for t in grads]
