"""The specification of `channel_importance`: plain PyTorch, in float32 (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("sq_batch", "sq_sample", "abs")


def channel_importance(activation: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """The scores [d] of the channels of `activation` [..., d], whose gradient is `grad` [..., d]."""
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    product = activation.to(dtype) * grad.to(dtype)
    leading = tuple(range(product.dim() - 1))
    if reduction == "abs":
        return product.abs().sum(leading) if leading else product.abs()
    if reduction == "sq_sample":
        per_sample = product.sum(leading[1:]) if leading[1:] else product
        return per_sample.square().sum(0) if leading else per_sample.square()
    return product.sum(leading).square() if leading else product.square()
