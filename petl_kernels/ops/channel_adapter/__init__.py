"""The salient-channel module: a linear layer on chosen channels, with its residual, while the others pass untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast
from petl_kernels.ops.channel_adapter.reference import channel_adapter as reference
from petl_kernels.ops.channel_adapter.validation import validate

__all__ = ["channel_adapter"]


def _fake_forward(x, channels, weight, bias, scale, alpha, scale_input, save_x):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], channels.shape[0]) if save_x else (0,))


def _fake_backward(g, x_channels, channels, weight, bias, scale, alpha, scale_input, needs):
    return g.new_empty(g.shape if needs[0] else (0,)), *new_gradients((weight, bias, scale), needs[1:], g)


def _preference(*_: Any) -> tuple[str, ...]:
    # Faster there than eager and than gather-linear-scatter: fp32, bf16, fp16 and fp64 with AVX-512 (and its bf16
    # instructions), fp32 and bf16 with AVX2.
    return ("cpp",)


def _sizes(x: Tensor, channels: Tensor, *_: Any) -> tuple[int, ...]:
    d = x.shape[-1]
    return x.numel() // d, d, channels.numel()


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=_preference, sizes=_sizes)

# `scale` and `alpha` are the tensor and the float form of the scale, the float being 1.0 beside a tensor. x_channels
# is x_C [..., k] in x's dtype, empty when `save_x` is false. Outputs are contiguous.
FORWARD = OP.direction(
    "channel_adapter_fwd(Tensor x, Tensor channels, Tensor weight, Tensor? bias, Tensor? scale, float alpha, "
    "bool scale_input, bool save_x) -> (Tensor y, Tensor x_channels)",
    "forward",
    _fake_forward,
)
# `needs` = (x, weight, bias, scale): a gradient that is not needed comes back as an empty tensor of g's dtype;
# x_channels is empty unless weight or scale needs it.
BACKWARD = OP.direction(
    "channel_adapter_bwd(Tensor g, Tensor x_channels, Tensor channels, Tensor weight, Tensor? bias, Tensor? scale, "
    "float alpha, bool scale_input, bool[] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale)",
    "backward",
    _fake_backward,
)


class _ChannelAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, channels, weight, bias, scale, alpha, scale_input, save_x, impl):
        y, x_channels = FORWARD(impl, x, channels, weight, bias, scale, alpha, scale_input, save_x)
        ctx.save_for_backward(x_channels, channels, weight, bias, scale)  # of x, N x d, nothing else is needed
        ctx.options = (alpha, scale_input)
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        dx, *grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, saved[0], *saved[2:]))
        return dx, None, *grads, None, None, None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x, weight, bias and scale, None where not needed."""
    x, _, *parameters = ctx.needs_input_grad[:5]
    needs = (x, *parameters)
    raw = BACKWARD(ctx.impl, g, *saved, *ctx.options, needs)
    return [grad if need else None for grad, need in zip(raw, needs)]


def _prepare(
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    scale_input: bool = False,
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, and under autocast with x in the autocast dtype."""
    validate(x, channels, weight, bias, scale, scale_input)
    return autocast(x), channels, weight, bias, scale, scale_input


OP.prepare = _prepare


def channel_adapter(
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    scale_input: bool = False,
    impl: str | None = None,
) -> Tensor:
    """A linear layer on the chosen channels C of x, added to them; the others pass as they are. Differentiable once.

    `y_C = x_C + scale * (x_C weight^T + bias)`, or, with `scale_input`, `y_C = scale * x_C + (x_C weight^T + bias)`:
    the salient-channel module of SCT (Zhao et al. 2023, arXiv:2309.08513), in both forms of its code. Out of place: x
    is not written to, and what the backward keeps of it is x_C alone, and only where weight or scale trains.

    Args:
        x: input [..., d], float32, bfloat16, float16 or float64, any strides. Under autocast it is first cast to the
            autocast dtype.
        channels: distinct int64 indices [k] into the last dimension of x, in any order, k from 0 to d.
        weight: [k, k], rows and columns in the order of `channels`. Parameters share one dtype, which may differ from
            x's (float32 masters beside bfloat16 activations); kernels cast as they read and accumulate in float32.
        bias: [k] in weight's dtype, or None.
        scale: a float, or a learned scalar [] or [1].
        scale_input: whether the scale multiplies x_C instead of the linear layer.
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d], contiguous, in x's dtype; outside `channels` bit for bit x. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device or impl that does not fit; channels that repeat or lie outside [0, d).
        TypeError: not a tensor, not floating point, channels that are not int64 [k], or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(x, channels, weight, bias, scale=scale, scale_input=scale_input)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    x = call[0]
    tensor, alpha = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    if not torch.is_grad_enabled():
        return FORWARD(chosen, x, channels, weight, bias, tensor, alpha, scale_input, False)[0]
    save_x = weight.requires_grad or (tensor is not None and tensor.requires_grad)
    return _ChannelAdapter.apply(x, channels, weight, bias, tensor, alpha, scale_input, save_x, chosen)
