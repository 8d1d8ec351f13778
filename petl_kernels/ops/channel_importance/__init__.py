"""First-order Taylor importance of channels: how much the loss would change without each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops.channel_importance.reference import channel_importance as reference
from petl_kernels.ops.channel_importance.validation import validate

__all__ = ["channel_importance"]


def _fake_forward(activation, grad, reduction):
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    return activation.new_empty((activation.shape[-1],), dtype=dtype)


def _preference(*_: Any) -> tuple[str, ...]:
    return ("cpp",)  # from benchmarks/results


def _sizes(activation: Tensor, *_: Any) -> tuple[int, ...]:
    d = activation.shape[-1]
    return activation.numel() // d, d


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=_preference, sizes=_sizes)

FORWARD = OP.direction(
    "channel_importance_fwd(Tensor activation, Tensor grad, str reduction) -> Tensor scores", "forward", _fake_forward
)


def _prepare(activation: Tensor, grad: Tensor, *, reduction: str = "sq_batch") -> tuple[Any, ...]:
    """The call that the implementations see: validated, and cut off from autograd."""
    validate(activation, grad, reduction)
    activation, grad = (t.detach() if t.requires_grad else t for t in (activation, grad))
    return activation, grad, reduction


OP.prepare = _prepare


def channel_importance(
    activation: Tensor, grad: Tensor, *, reduction: str = "sq_batch", impl: str | None = None
) -> Tensor:
    """Scores [d] of the channels of an activation, from the activation and the gradient of the loss in it.

    First-order Taylor expansion: a channel's contribution to the loss is sum(activation * grad), the gradient of a
    gate of 1 that multiplies the channel (Molchanov et al. 2019, arXiv:1906.10771, section 3, in the forms of their
    code, NVlabs/Taylor_pruning). Scores of several batches add up. Not differentiable.

    Args:
        activation: [..., d], float32, bfloat16, float16 or float64, any strides; dim 0 is the batch.
        grad: dL/dactivation, of the same shape. Its dtype may differ; float64 mixes with nothing.
        reduction: "sq_batch": (sum over all leading dimensions of a g)^2, their method 22.
            "sq_sample": the sum over samples of (sum over the middle dimensions of a g)^2, their method 23. Each row
            of a 2-D activation is a sample, and a 1-D activation is one.
            "abs": sum of |a g|.
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [d], float32 (float64 for float64), never requiring a gradient; products and sums are made in that precision.

    Raises:
        ValueError: a shape, device, reduction or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why.
    """
    call = _prepare(activation, grad, reduction=reduction)
    chosen = OP.select(impl, *call)
    return reference(*call) if chosen == REFERENCE else FORWARD(chosen, *call)
