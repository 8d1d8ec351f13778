"""What `adapter_norm` and `norm_adapter` share: the normalisation they absorb, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.ops._validate import check_dtype, check_shape, check_tensor

NORMS = ("layer", "rms")


def normalise(u: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """PyTorch's own layer norm or RMS norm over the last dimension, with parameters cast to the dtype of u."""
    shape = (u.shape[-1],)
    weight = None if weight is None else weight.to(u.dtype)
    if norm == "rms":
        return F.rms_norm(u, shape, weight, eps)
    return F.layer_norm(u, shape, weight, None if bias is None else bias.to(u.dtype), eps)


def check_norm(op: str, x: Tensor, d: int, weight: Any, bias: Any, norm: Any, eps: Any) -> None:
    """A normalisation of d channels; RMSNorm has no shift."""
    for name, value in (("ln_weight", weight), ("ln_bias", bias)):
        if value is not None:
            check_tensor(op, name, value, x)
            check_shape(op, name, value, (d,), "[d]")
    if weight is not None and bias is not None:
        check_dtype(op, "ln_bias", bias, weight, "ln_weight")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {NORMS}, got {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError(f"{op}: ln_bias must be None with norm='rms', got a tensor")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def new_statistics(like: Tensor, rows: int, norm: str, centred: bool = True) -> tuple[Tensor, Tensor]:
    """mean and rstd of `rows` rows in float32, float64 beside float64; no mean of RMSNorm or where not `centred`."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((rows if centred and norm == "layer" else 0,), dtype=wide), like.new_empty(
        (rows,), dtype=wide
    )
