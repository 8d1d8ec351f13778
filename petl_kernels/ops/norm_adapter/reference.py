"""The specification of `norm_adapter`: plain, differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor

from petl_kernels.ops._adapter_norm import normalise
from petl_kernels.ops._validate import autocast
from petl_kernels.ops.bottleneck_adapter.reference import bottleneck_adapter


def norm_adapter(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: float | Tensor,
    activation: str,
    norm: str,
    eps: float,
) -> Tensor:
    """`residual + scale * (act(u w_down^T + b_down) w_up^T + b_up)` with `u = norm(x)`.

    The norm is computed in the dtype of x; the branch too or, under autocast, in the autocast dtype.
    """
    u = autocast(normalise(x, ln_weight, ln_bias, norm, eps))
    return bottleneck_adapter(u, w_down, b_down, w_up, b_up, residual, scale, None, None, 0.0, activation)
