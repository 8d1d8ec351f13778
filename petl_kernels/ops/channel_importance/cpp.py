"""`channel_importance` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, empty, row_major, rows
from petl_kernels.ops.channel_importance.reference import REDUCTIONS

_REDUCTIONS = {name: code for code, name in enumerate(REDUCTIONS)}


def unsupported(activation: Tensor, grad: Tensor, reduction: str) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    if activation.device.type == "cpu":
        return None
    return f"it runs on the CPU, and activation is on {activation.device}"


def forward(activation: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """One pass over both operands; schema in the op's `__init__`."""
    d = activation.shape[-1]
    scores = empty((d,), torch.float64 if activation.dtype == torch.float64 else torch.float32)
    if activation.numel() == 0:
        return scores.zero_()
    n = activation.numel() // d
    samples = activation.shape[0] if activation.dim() > 1 else 1
    operands = [row_major(t) for t in (activation, grad)]  # copies among them live until the call is over
    _cpu.channel_importance(
        (n, d, n // samples), *map(rows, operands), _REDUCTIONS[reduction], rows(scores), torch.get_num_threads()
    )
    return scores
