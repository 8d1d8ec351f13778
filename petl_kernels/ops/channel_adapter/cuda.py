"""`channel_adapter` on the CUDA kernels of `petl_kernels._cuda`: one launch forward, at most three backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from petl_kernels.ops._cuda import Workspace, _cuda, cannot_run, launch_on
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows

_MAX_CHANNELS = 384  # as in csrc/cuda/channel_adapter.cu


def unsupported(
    x: Tensor, channels: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, scale_input: bool
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if channels.shape[0] > _MAX_CHANNELS:
        return f"it takes at most {_MAX_CHANNELS} channels, got k = {channels.shape[0]}"
    return cannot_run(x, weight)


def forward(
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    scale_input: bool,
    save_x: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., d] and x_channels [..., k] (empty unless `save_x`); shapes and dtypes as in the op's schema."""
    d, k = x.shape[-1], channels.shape[0]
    y = x.new_empty(x.shape)
    x_channels = x.new_empty((*x.shape[:-1], k) if save_x else (0,))
    if y.numel() == 0:
        return y, x_channels
    channels = channels.contiguous()
    inputs = [row_major(t) for t in (x, weight, bias, scale)]
    _cuda.channel_adapter_forward(
        launch_on(x.device),
        (y.numel() // d, d, k),
        channels.data_ptr(),
        *map(rows, inputs),
        float(alpha),
        scale_input,
        rows(y),
        rows(x_channels) if save_x else None,
    )
    return y, x_channels


def backward(
    g: Tensor,
    x_channels: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    scale_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, weight, bias, scale); an empty tensor for each that is not needed."""
    d, k = g.shape[-1], channels.shape[0]
    dx = g.new_empty(g.shape if needs[0] else (0,))
    grads = new_gradients((weight, bias, scale), needs[1:], g)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    channels = channels.contiguous()
    inputs = [row_major(t) for t in (g, x_channels, weight, bias, scale)]
    _cuda.channel_adapter_backward(
        launch_on(g.device),
        (g.numel() // d, d, k),
        channels.data_ptr(),
        *map(rows, inputs),
        float(alpha),
        scale_input,
        *(rows(t) if need else None for t, need in zip((dx, *grads), needs)),
        Workspace(g.device),
    )
    return dx, *grads
