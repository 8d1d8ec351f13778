"""Layer normalisation over the last dimension, with the gradients of scale and shift in the pass that makes dx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops.layer_norm.reference import layer_norm as reference
from petl_kernels.ops.layer_norm.validation import validate

__all__ = ["layer_norm"]


def _fake_forward(x, weight, bias, eps, save):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = (x.numel() // x.shape[-1] if save else 0,)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_backward(g, x, mean, rstd, weight, bias, needs):
    return g.new_empty(g.shape if needs[0] else (0,)), *new_gradients((weight, bias), needs[1:], g)


# Elements from which on the C++ kernels pay (benchmarks/results). In float32 eager is 4 to 19 % faster up to
# 4096 x 1024 and up to 2.5 times slower from 12608 x 768 on; in bfloat16 only its cheaper call is an advantage.
_WORTHWHILE = {torch.float32: 1 << 23}
_WORTHWHILE_ELSE = 1 << 18


def _preference(x: Tensor, *_: Any) -> tuple[str, ...]:
    # To a compiler a size may be a symbol, and a bound on it would become a condition of the graph.
    if not torch.compiler.is_compiling() and x.numel() < _WORTHWHILE.get(x.dtype, _WORTHWHILE_ELSE):
        return ()
    return ("cpp",)


def _sizes(x: Tensor, *_: Any) -> tuple[int, ...]:
    d = x.shape[-1]
    return x.numel() // d, d


OP = Op(__name__, impls=("cpp", "triton"), preference=_preference, sizes=_sizes)

# mean and rstd = 1 / sqrt(variance + eps) are [rows] in float32 (float64 for float64), empty when `save` is false.
# Outputs are contiguous.
FORWARD = OP.direction(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool save) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    "forward",
    _fake_forward,
)
# `needs` = (x, weight, bias): a gradient that is not needed comes back as an empty tensor of g's dtype. x is None, and
# mean and rstd are empty, where only bias needs one. bias is there for its dtype.
BACKWARD = OP.direction(
    "layer_norm_bwd(Tensor g, Tensor? x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    "backward",
    _fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, save, impl):
        y, mean, rstd = FORWARD(impl, x, weight, bias, eps, save)
        ctx.save_for_backward(x if save else None, mean, rstd, weight, bias)
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads, None, None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x, weight and bias, None where not needed."""
    needs = ctx.needs_input_grad[:3]
    return [grad if need else None for grad, need in zip(BACKWARD(ctx.impl, g, *saved, needs), needs)]


def _prepare(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> tuple[Any, ...]:
    """The call that the implementations see: validated, and under CUDA autocast with x in float32."""
    validate(x, weight, bias, eps)
    # As F.layer_norm does, which autocast makes in float32 on GPUs and leaves alone on the CPU.
    if x.device.type == "cuda" and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        x = x.float()
    return x, weight, bias, eps


OP.prepare = _prepare


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, *, impl: str | None = None
) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension, differentiable once.

    Ba et al. 2016 (arXiv:1607.06450), as `torch.nn.functional.layer_norm`: the variance is the biased one. Statistics
    are float32 (float64 for float64). Stage 1 of TTC-tuning (arXiv:2303.07910) trains the scale and shift alone: where
    x needs no gradient, none is computed for it.

    Args:
        x: input [..., d], float32, bfloat16, float16 or float64, any strides. Under CUDA autocast it is first cast to
            float32; CPU autocast leaves layer normalisation alone, as it does PyTorch's.
        weight: scale [d], or None. Parameters share one dtype, which may differ from x's; float64 mixes with nothing.
        bias: shift [d], or None.
        eps: what is added to the variance, at least 0.
        impl: "reference", "cpp", "triton", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d], contiguous, in x's dtype. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, eps or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(x, weight, bias, eps)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    x, eps = call[0], float(eps)
    if not torch.is_grad_enabled():
        return FORWARD(chosen, x, weight, bias, eps, False)[0]
    save = x.requires_grad or (weight is not None and weight.requires_grad)
    return _LayerNorm.apply(x, weight, bias, eps, save, chosen)
