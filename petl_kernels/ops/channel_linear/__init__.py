"""A frozen linear layer of which only chosen output rows or input columns are trained."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast, version
from petl_kernels.ops.channel_linear.reference import channel_linear as reference
from petl_kernels.ops.channel_linear.validation import validate

__all__ = ["channel_linear"]


def _fake_backward(g, x, channels, channel_weight, channel_bias, dim, needs):
    return tuple(new_gradients((channel_weight, channel_bias), needs, channel_weight))


def _preference(*_: Any) -> tuple[str, ...]:
    return ("cpp",)  # from benchmarks/results


def _sizes(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Tensor, *_: Any) -> tuple[int, ...]:
    d_out, d_in = weight.shape
    return x.numel() // d_in, d_in, d_out, channels.numel()


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=_preference, sizes=_sizes)

# There is no forward direction: y = x W^T + b and dx = g W are torch's own products, which no kernel of ours would
# beat, and which a compiler fuses with its surroundings. What is ours is the gradient of the chosen part.
# x: [..., d_in] with dim 0, already gathered [..., k] with dim 1, None unless channel_weight needs a gradient.
# `needs` = (channel_weight, channel_bias): a gradient that is not needed comes back as an empty tensor.
BACKWARD = OP.direction(
    "channel_linear_bwd(Tensor g, Tensor? x, Tensor channels, Tensor channel_weight, Tensor? channel_bias, int dim, "
    "bool[] needs) -> (Tensor dchannel_weight, Tensor dchannel_bias)",
    "backward",
    _fake_backward,
)


class _Source(NamedTuple):
    """What the chosen part of a weight was last written from."""

    channel_weight: weakref.ref[Tensor]
    version: int | None
    channels: weakref.ref[Tensor]


_written: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> _Source


@torch.no_grad()
def _write(
    weight: Tensor, bias: Tensor | None, channels: Tensor, channel_weight: Tensor, channel_bias: Tensor | None, dim: int
) -> None:
    """Put the trained part in its place in `weight` and `bias`: k/d of a copy, and never a second weight."""
    weight.index_copy_(dim, channels, channel_weight.to(weight.dtype))
    if bias is not None and channel_bias is not None:
        bias.index_copy_(0, channels, channel_bias.to(bias.dtype))


def _synchronize(weight: Tensor, bias: Tensor | None, channels: Tensor, channel_weight: Tensor, *rest: Any) -> None:
    """`_write`, at every call, because others may write there too (FSDP gathers a weight anew).

    The version of `weight` changes only with the values: whoever saved it before is told by autograd, while a layer
    used twice in one forward stays valid.
    """
    last: _Source | None = _written.get(weight)
    current = version(channel_weight)
    same = last is not None and last.channel_weight() is channel_weight and last.channels() is channels
    if last is not None and same and last.version == current is not None:
        with torch.autograd._unsafe_preserve_version_counter(weight):
            _write(weight, bias, channels, channel_weight, *rest)
        return
    _write(weight, bias, channels, channel_weight, *rest)
    _written[weight] = _Source(weakref.ref(channel_weight), current, weakref.ref(channels))


def _write_again(weight: Tensor, channels: Tensor, channel_weight: Tensor, dim: int) -> None:
    """What the forward wrote, for dx: FSDP2 frees a gathered weight in between and gathers what the shards hold.

    Autograd cannot tell, since FSDP2 keeps the version; it does tell if anybody else wrote.
    """
    with torch.autograd._unsafe_preserve_version_counter(weight):
        _write(weight, None, channels, channel_weight, None, dim)


class _ChannelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, channels, channel_weight, channel_bias, dim, impl):
        y = F.linear(x, weight, bias)
        seen = None
        if channel_weight.requires_grad:
            seen = x if dim == 0 else x.index_select(-1, channels)
        # channel_weight is saved for its version: after an optimizer step `weight` is no longer what made y.
        ctx.save_for_backward(weight if x.requires_grad else None, seen, channels, channel_weight, channel_bias)
        ctx.dim, ctx.impl = dim, impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved[1:]))
        return grads[0], None, None, None, *grads[1:], None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Any]) -> Sequence[Tensor | None]:
    """The gradients of x, channel_weight and channel_bias, None where not needed."""
    weight, x, channels, channel_weight, channel_bias = saved
    needs = (ctx.needs_input_grad[4], ctx.needs_input_grad[5])
    if isinstance(weight, torch.nn.Parameter) and not torch.compiler.is_compiling():
        _write_again(weight, channels, channel_weight, ctx.dim)
    grads: list[Tensor | None] = [g.matmul(weight) if ctx.needs_input_grad[0] else None, None, None]
    if True in needs:
        raw = BACKWARD(ctx.impl, g, x, channels, channel_weight, channel_bias, ctx.dim, needs)
        grads[1:] = [grad if need else None for grad, need in zip(raw, needs)]
    return grads


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None = None,
    *,
    dim: int = 0,
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, and under autocast with x in the autocast dtype."""
    validate(x, weight, bias, channels, channel_weight, channel_bias, dim)
    return autocast(x), weight, bias, channels, channel_weight, channel_bias, dim


OP.prepare = _prepare


def channel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None = None,
    *,
    dim: int = 0,
    impl: str | None = None,
) -> Tensor:
    """A frozen linear layer with trained output rows or input columns: `x W'^T + b'`, differentiable once.

    W' is `weight` with `channel_weight` in the place of the rows (dim 0) or columns (dim 1) `channels`. The backward
    computes `g[:, channels]^T x` or `g^T x[:, channels]` and never the dense gradient; dim 1 saves `x[..., channels]`
    only. Gradient, optimizer state and all-reduce are k/d of the dense ones, with any optimizer. Partial updates as in
    PaCA (arXiv:2503.01905) and S2FT (arXiv:2412.06289); channels as in SCT (arXiv:2309.08513).

    Args:
        x: input [..., d_in], float32, bfloat16, float16 or float64, any strides. Under autocast it is first cast to
            the autocast dtype.
        weight: the frozen weight [d_out, d_in]. Except with the reference and under torch.export it is kept in sync
            **in place**: after a call it holds `channel_weight` at `channels`, rounded to its own dtype. A step of
            the optimizer between forward and backward is an error, as for any parameter.
        bias: its frozen bias [d_out], kept in sync likewise, or None.
        channels: distinct int64 indices [k], in any order; k may be 0. Their values are read once per tensor.
        channel_weight: what trains, [k, d_in] (dim 0) or [d_out, k] (dim 1); its dtype may differ from weight's.
        channel_bias: the trained part of the bias, [k], with dim 0 only; or None, and the bias stays frozen.
        dim: 0 for output rows, 1 for input columns.
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d_out] in x's dtype. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, channel, dim or impl that does not fit; a weight or bias that is not frozen, or
            that is expanded.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(x, weight, bias, channels, channel_weight, channel_bias, dim=dim)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    x = call[0]
    if torch.compiler.is_exporting():  # a program may not write to its parameters
        weight = weight.index_copy(dim, channels, channel_weight.detach().to(weight.dtype))
        if bias is not None and channel_bias is not None:
            bias = bias.index_copy(0, channels, channel_bias.detach().to(bias.dtype))
    elif torch.compiler.is_compiling():  # which orders writes and reads by itself
        _write(weight, bias, channels, channel_weight, channel_bias, dim)
    else:
        _synchronize(weight, bias, channels, channel_weight, channel_bias, dim)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _ChannelLinear.apply(x, weight, bias, channels, channel_weight, channel_bias, dim, chosen)
