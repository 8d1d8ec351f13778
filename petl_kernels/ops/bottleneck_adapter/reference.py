"""The specification of `bottleneck_adapter`: plain, differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.ops._dropout import keep

# In the order of the enum Activation in csrc/petl.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": lambda z: z,
    "softmax": lambda z: z.softmax(-1),
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: float | Tensor,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    activation: str,
) -> Tensor:
    """`residual + gate * scale * (drop(act(x w_down^T + b_down)) w_up^T + b_up)`, computed in the dtype of `x`.

    Shapes: x [..., d_in], w_down [r, d_in], b_down [r], w_up [d_out, r], b_up [d_out], residual [..., d_out],
    scale a float, [], [1] or [d_out], gate [..., 1], seed [1] or None for PyTorch's own dropout. The result has the
    promoted dtype of x and residual.
    """

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    z = F.linear(x, w_down.to(x.dtype), cast(b_down))
    h = ACTIVATIONS[activation](z)
    if seed is not None:
        kept = keep(seed, h[..., 0].numel(), h.shape[-1], dropout).view(h.shape)
        h = torch.where(kept, h * (1 / (1 - dropout)), 0.0)
    elif dropout:
        h = F.dropout(h, dropout)
    y = F.linear(h, w_up.to(x.dtype), cast(b_up))
    if isinstance(scale, Tensor):
        y = y * scale.to(x.dtype)
    elif scale != 1.0:
        y = y * scale
    if gate is not None:
        y = y * gate.to(x.dtype)
    return y if residual is None else residual + y
