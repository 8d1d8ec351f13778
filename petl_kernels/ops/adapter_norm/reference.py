"""The specification of `adapter_norm`: plain, differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor

from petl_kernels.ops._adapter_norm import normalise
from petl_kernels.ops.bottleneck_adapter.reference import bottleneck_adapter


def adapter_norm(
    x: Tensor,
    residual: Tensor | None,
    hidden: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: float | Tensor,
    activation: str,
    norm: str,
    eps: float,
) -> Tensor:
    """`norm(residual + hidden + scale * (act(x w_down^T + b_down) w_up^T + b_up))`, with x for a hidden of None.

    The branch is computed in the dtype of x, the sum and its norm in the promoted dtype of its terms.
    """
    term = x if hidden is None else hidden
    u = bottleneck_adapter(x, w_down, b_down, w_up, b_up, term, scale, None, None, 0.0, activation)
    return normalise(u if residual is None else u + residual, ln_weight, ln_bias, norm, eps)
