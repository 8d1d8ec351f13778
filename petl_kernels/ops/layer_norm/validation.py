"""What a call of `layer_norm` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

import torch

from petl_kernels.ops._validate import check_dtype, check_shape, check_tensor

_OP = "layer_norm"


def validate(x: Any, weight: Any, bias: Any, eps: Any) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_tensor(_OP, "x", x, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x must be [..., d] with d at least 1, got {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(_OP, name, value, x)
            check_shape(_OP, name, value, (x.shape[-1],), "[d]")
    if weight is not None and bias is not None:
        check_dtype(_OP, "bias", bias, weight, "weight")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"{_OP}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{_OP}: eps must be at least 0, got {eps}")
