"""The refusal of a second differentiation, in our own words instead of a foreign message."""

from __future__ import annotations

from collections.abc import Sequence
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


def refuse_double_backward(
    name: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Attach to `grads` a node that raises when they are differentiated again with respect to any of `inputs`.

    Only `create_graph=True` leaves gradients enabled inside a backward; nothing happens without it, and
    differentiating once under it stays legal.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(grads)
    present = [t for t in grads if t is not None]
    anchors = [t for t in inputs if t is not None]
    guarded = iter(_FirstOrderOnly.apply(name, len(present), *present, *anchors))
    return tuple(None if t is None else next(guarded) for t in grads)
