"""The specification of `channel_linear`: plain, differentiable PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def channel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
) -> Tensor:
    """`x W'^T + b'` in x's dtype; W' is `weight` with `channel_weight` at rows (dim 0) or columns (dim 1) `channels`.

    A second weight is made at every call and autograd computes the whole dense gradient: what the kernels avoid.
    """
    weight = weight.index_copy(dim, channels, channel_weight.to(weight.dtype))
    if bias is not None and channel_bias is not None:
        bias = bias.index_copy(0, channels, channel_bias.to(bias.dtype))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
