"""The specification of `adapter_bank`: plain, differentiable PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS


def adapter_bank(
    x: Tensor,
    task: Tensor,
    w_down: Sequence[Tensor],
    b_down: Sequence[Tensor],
    w_up: Sequence[Tensor],
    b_up: Sequence[Tensor],
    residual: Tensor | None,
    scale: float,
    activation: str,
) -> Tensor:
    """`residual + scale * (act(x w_down[t]^T + b_down[t]) w_up[t]^T + b_up[t])` with t = task[sample], in x's dtype.

    Shapes: x [*task.shape, ..., d_in], w_down[t] [r, d_in], b_down[t] [r], w_up[t] [d_out, r], b_up[t] [d_out],
    residual [*task.shape, ..., d_out]; biases may be empty lists. The weights of every sample are gathered: no shape
    depends on the values of `task`, so that a compiler can trace it.
    """

    def of_samples(parameters: Sequence[Tensor]) -> Tensor:
        return torch.stack([p.to(x.dtype) for p in parameters])[task.flatten()]

    rows = x.reshape(task.numel(), math.prod(x.shape[task.dim() : -1]), x.shape[-1])
    z = rows @ of_samples(w_down).mT
    if b_down:
        z = z + of_samples(b_down).unsqueeze(1)
    y = ACTIVATIONS[activation](z) @ of_samples(w_up).mT
    if b_up:
        y = y + of_samples(b_up).unsqueeze(1)
    if scale != 1.0:
        y = y * scale
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if residual is None else residual + y
