"""A trained factor for each channel, with its gradient in the pass that makes dx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast
from petl_kernels.ops.channel_scale.reference import channel_scale as reference
from petl_kernels.ops.channel_scale.validation import validate

__all__ = ["channel_scale"]


def _fake_forward(x, scale):
    return x.new_empty(x.shape)


def _fake_backward(g, x, scale, needs):
    return g.new_empty(g.shape if needs[0] else (0,)), *new_gradients((scale,), needs[1:], g)


def _worthwhile(x: Tensor, scale: Tensor) -> int:
    """Elements from which on the C++ kernels pay on the CPU (two cores, AVX-512): their call costs 4 to 18 us more."""
    if scale.dtype != x.dtype:
        return 1 << 16  # 1.2 to 1.3 times faster; at 1024 x 768 2.7 times. Eager's product is first written in float32.
    if x.dtype.itemsize == 2:
        return 1 << 19  # bfloat16 1.5 to 1.7 times faster; float16, at 512 x 768, 1.04 times
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return 1 << 20  # as fast at 683 x 768, 1.2 to 1.6 times faster at 1024 x 768
    # Of a product alone torch's takes 5 to 18 % less time up to 8192 x 768. At 12608 x 768, behind a fresh output, the
    # kernel's huge pages make it 1.2 to 3.3 times faster.
    return 1 << 23


def _preference(x: Tensor, scale: Tensor) -> tuple[str, ...]:
    # A compiler fuses the product with what surrounds it, of which there are no figures.
    if torch.compiler.is_compiling() or x.numel() < _worthwhile(x, scale):
        return ()
    return ("cpp",)


def _sizes(x: Tensor, scale: Tensor) -> tuple[int, ...]:
    d = x.shape[-1]
    return x.numel() // d, d


OP = Op(__name__, impls=("cpp", "triton"), preference=_preference, sizes=_sizes)

# Outputs are contiguous.
FORWARD = OP.direction("channel_scale_fwd(Tensor x, Tensor scale) -> Tensor y", "forward", _fake_forward)
# `needs` = (x, scale): a gradient that is not needed comes back as an empty tensor of g's dtype. x is None unless scale
# needs one.
BACKWARD = OP.direction(
    "channel_scale_bwd(Tensor g, Tensor? x, Tensor scale, bool[] needs) -> (Tensor dx, Tensor dscale)",
    "backward",
    _fake_backward,
)


class _ChannelScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, impl):
        ctx.save_for_backward(x if scale.requires_grad else None, scale)
        ctx.impl = impl
        return FORWARD(impl, x, scale)

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x and scale, None where not needed."""
    needs = ctx.needs_input_grad[:2]
    return [grad if need else None for grad, need in zip(BACKWARD(ctx.impl, g, *saved, needs), needs)]


def _prepare(x: Tensor, scale: Tensor) -> tuple[Any, ...]:
    """The call that the implementations see: validated, and under autocast with x in the autocast dtype."""
    validate(x, scale)
    return autocast(x), scale


OP.prepare = _prepare


def channel_scale(x: Tensor, scale: Tensor, *, impl: str | None = None) -> Tensor:
    """`x * scale` over the last dimension, differentiable once.

    The learned vectors of (IA)^3, Liu et al. 2022 (arXiv:2205.05638), which multiply the keys, the values and the inner
    activations of the feed-forward layers; `nn.IA3Linear` puts them behind or before a frozen linear. The backward
    makes `g * scale` and the sum over rows of `g * x` in one pass; x is saved only if `scale` trains.

    Args:
        x: input [..., d], float32, bfloat16, float16 or float64, any strides. Under autocast it is first cast to the
            autocast dtype.
        scale: the factors [d]; their dtype may differ from x's (float32 masters beside bfloat16 activations), float64
            mixes with nothing. Products are float32 (float64 for float64), rounded once to x's dtype.
        impl: "reference", "cpp", "triton", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d] in x's dtype. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(x, scale)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    if not torch.is_grad_enabled():
        return FORWARD(chosen, *call)
    return _ChannelScale.apply(*call, chosen)
