"""The specification of `channel_adapter`: plain, differentiable PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def channel_adapter(
    x: Tensor, channels: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, scale_input: bool
) -> Tensor:
    """A copy of x whose `channels` C hold `x_C + scale * u`, or `scale * x_C + u`; u = x_C weight^T + bias.

    Shapes: x [..., d], channels int64 [k], weight [k, k], bias [k], scale a float, [] or [1]. Computed in the dtype of
    `x`, which is the result's.
    """
    chosen = x.index_select(-1, channels)
    u = F.linear(chosen, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    s = scale.to(x.dtype) if isinstance(scale, Tensor) else scale
    return x.contiguous().index_copy(-1, channels, s * chosen + u if scale_input else chosen + s * u)
