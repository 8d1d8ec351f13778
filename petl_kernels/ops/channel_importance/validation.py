"""What a call of `channel_importance` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from petl_kernels.ops._validate import check_shape, check_tensor
from petl_kernels.ops.channel_importance.reference import REDUCTIONS

_OP = "channel_importance"


def validate(activation: Any, grad: Any, reduction: Any) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_tensor(_OP, "activation", activation, activation, "activation")
    check_tensor(_OP, "grad", grad, activation, "activation")
    if activation.dim() < 1 or activation.shape[-1] == 0:
        raise ValueError(f"{_OP}: activation must be [..., d] with d at least 1, got {list(activation.shape)}")
    check_shape(_OP, "grad", grad, activation.shape, "activation's shape [..., d]")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{_OP}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
