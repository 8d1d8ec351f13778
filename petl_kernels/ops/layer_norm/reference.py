"""The specification of `layer_norm`: PyTorch's own, with parameters cast to the dtype of x."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension of x [..., d]."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    return F.layer_norm(x, (x.shape[-1],), cast(weight), cast(bias), eps)
