"""The specification of `channel_scale`: a product in the promoted dtype, rounded to the dtype of x."""

from __future__ import annotations

from torch import Tensor


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """`x * scale` over the last dimension of x [..., d]."""
    return (x * scale).to(x.dtype)
