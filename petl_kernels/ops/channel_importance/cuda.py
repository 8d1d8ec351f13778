"""`channel_importance` on the CUDA kernels of `petl_kernels._cuda`: one pass, and the sum over its groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.ops._cuda import Workspace, _cuda, cannot_run, launch_on
from petl_kernels.ops._rows import row_major, rows
from petl_kernels.ops.channel_importance.reference import REDUCTIONS

_REDUCTIONS = {name: code for code, name in enumerate(REDUCTIONS)}


def unsupported(activation: Tensor, grad: Tensor, reduction: str) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return cannot_run(activation, grad)


def forward(activation: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """One pass over both operands; schema in the op's `__init__`."""
    d = activation.shape[-1]
    scores = activation.new_empty((d,), dtype=torch.float32)
    if activation.numel() == 0:
        return scores.zero_()
    n = activation.numel() // d
    samples = activation.shape[0] if activation.dim() > 1 else 1
    operands = [row_major(t) for t in (activation, grad)]
    _cuda.channel_importance(
        launch_on(activation.device),
        (n, d, n // samples),
        *map(rows, operands),
        _REDUCTIONS[reduction],
        rows(scores),
        Workspace(activation.device),
    )
    return scores
