"""The gradients of `channel_linear` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, new_gradients, row_major, rows


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


def backward(
    g: Tensor,
    x: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """One pass over g and x: the gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    dw, db = new_gradients((channel_weight, channel_bias), needs, channel_weight.dtype)
    if dw.numel() + db.numel() == 0:
        return dw, db
    n = g.numel() // g.shape[-1]
    if n == 0:
        return dw.zero_(), db.zero_()
    picked, dense = (g, x) if dim == 0 else (x, g)
    picked, dense = row_major(picked), row_major(dense) if needs[0] else None
    _cpu.channel_gradient(
        (n, channels.shape[0], channel_weight.shape[1 - dim]),
        rows(picked),
        channels.contiguous().data_ptr() if dim == 0 else 0,
        rows(dense),
        dim == 1,
        rows(dw) if needs[0] else None,
        rows(db) if needs[1] else None,
        torch.get_num_threads(),
    )
    return dw, db
