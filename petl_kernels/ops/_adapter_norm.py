"""What `adapter_norm` and `norm_adapter` share: the normalisation they absorb, and the checks of their arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.ops._validate import check_dtype, check_scale, check_shape, check_tensor
from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS

NORMS = ("layer", "rms")


def normalise(u: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """PyTorch's own layer norm or RMS norm over the last dimension, with parameters cast to the dtype of u."""
    shape = (u.shape[-1],)
    weight = None if weight is None else weight.to(u.dtype)
    if norm == "rms":
        return F.rms_norm(u, shape, weight, eps)
    return F.layer_norm(u, shape, weight, None if bias is None else bias.to(u.dtype), eps)


def check_adapter(
    op: str, x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, scale: Any, activation: Any
) -> tuple[int, int]:
    """The branch: a bottleneck whose widths fit, as `bottleneck_adapter` takes it. Returns (d_in, d_out)."""
    for name, value in (("x", x), ("w_down", w_down), ("w_up", w_up)):
        check_tensor(op, name, value, x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., d_in] with at least one dimension, got a 0-dim tensor")
    for name, w, of, size in (
        ("w_down", w_down, "[r, d_in] with d_in", x.shape[-1]),
        ("w_up", w_up, "[d_out, r] with r", None),
    ):
        wanted = w_down.shape[0] if size is None else size
        if w.dim() != 2 or w.shape[1] != wanted:
            raise ValueError(f"{op}: {name} must be {of} = {wanted}, got {list(w.shape)}")
    if 0 in w_down.shape or w_up.shape[0] == 0:
        raise ValueError(
            f"{op}: d_in, r and d_out must be at least 1, got w_down {list(w_down.shape)}, w_up {list(w_up.shape)}"
        )
    check_dtype(op, "w_up", w_up, w_down, "w_down")
    for name, bias, size, words in (
        ("b_down", b_down, w_down.shape[0], "[r]"),
        ("b_up", b_up, w_up.shape[0], "[d_out]"),
    ):
        if bias is not None:
            check_tensor(op, name, bias, x)
            check_dtype(op, name, bias, w_down, "w_down")
            check_shape(op, name, bias, (size,), words)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    d_out = w_up.shape[0]
    check_scale(op, scale, x, ((), (1,), (d_out,)), f"[], [1] or [d_out] = [{d_out}]")
    return x.shape[-1], d_out


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


def check_term(op: str, name: str, value: Any, x: Tensor, d_out: int) -> None:
    """Something that is added to what the branch gives: of its shape, or None."""
    if value is not None:
        check_tensor(op, name, value, x)
        check_shape(op, name, value, (*x.shape[:-1], d_out), "[..., d_out]")


def new_statistics(like: Tensor, rows: int, norm: str, centred: bool = True) -> tuple[Tensor, Tensor]:
    """mean and rstd of `rows` rows in float32, float64 beside float64; no mean of RMSNorm or where not `centred`."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((rows if centred and norm == "layer" else 0,), dtype=wide), like.new_empty(
        (rows,), dtype=wide
    )
