"""What a call of `norm_adapter` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from petl_kernels.ops._adapter_norm import check_norm
from petl_kernels.ops.bottleneck_adapter.validation import check_bottleneck, check_term

_OP = "norm_adapter"


def validate(
    x: Any,
    ln_weight: Any,
    ln_bias: Any,
    w_down: Any,
    b_down: Any,
    w_up: Any,
    b_up: Any,
    residual: Any,
    scale: Any,
    activation: Any,
    norm: Any,
    eps: Any,
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_bottleneck(_OP, x, w_down, b_down, w_up, b_up, scale, activation)
    check_term(_OP, "residual", residual, x, w_up)
    check_norm(_OP, x, x.shape[-1], ln_weight, ln_bias, norm, eps)
