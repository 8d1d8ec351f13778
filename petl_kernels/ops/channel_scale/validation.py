"""What a call of `channel_scale` has to look like; every error names op, argument, got and wanted."""

from __future__ import annotations

from typing import Any

from petl_kernels.ops._validate import check_shape, check_tensor

_OP = "channel_scale"


def validate(x: Any, scale: Any) -> None:
    """Raise a ValueError or TypeError for a call that has no meaning; read shapes and dtypes only."""
    check_tensor(_OP, "x", x, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x must be [..., d] with d at least 1, got {list(x.shape)}")
    check_tensor(_OP, "scale", scale, x)
    check_shape(_OP, "scale", scale, (x.shape[-1],), "[d]")
