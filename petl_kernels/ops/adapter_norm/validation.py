"""What a call of `adapter_norm` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from petl_kernels.ops._adapter_norm import check_norm
from petl_kernels.ops.bottleneck_adapter.validation import check_bottleneck, check_term

_OP = "adapter_norm"


def validate(
    x: Any,
    residual: Any,
    w_down: Any,
    b_down: Any,
    w_up: Any,
    b_up: Any,
    ln_weight: Any,
    ln_bias: Any,
    hidden: Any,
    scale: Any,
    activation: Any,
    norm: Any,
    eps: Any,
) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_bottleneck(_OP, x, w_down, b_down, w_up, b_up, scale, activation)
    check_term(_OP, "residual", residual, x, w_up)
    check_term(_OP, "hidden", hidden, x, w_up)
    d_in, d_out = x.shape[-1], w_up.shape[0]
    if hidden is None and d_in != d_out:
        raise ValueError(f"{_OP}: w_up must be [d, r] with d = {d_in} where x is a term of the sum, got {d_out} rows")
    check_norm(_OP, x, d_out, ln_weight, ln_bias, norm, eps)
