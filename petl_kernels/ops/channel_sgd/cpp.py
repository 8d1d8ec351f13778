"""`channel_sgd_` on the CPU kernels of `petl_kernels._cpu`: one call for all tensors."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._channel_step import Table, Tensors, cannot_walk, step_over
from petl_kernels.ops._native import _cpu


def unsupported(params: Tensors, grads: Tensors, momentum_buffers: Tensors, *rest: Any) -> str | None:
    """Why this call cannot run, or None."""
    if params and params[0].device.type != "cpu":
        return f"it runs on the CPU, and params are on {params[0].device}"
    return cannot_walk(params, grads, (momentum_buffers,), rest[1], rest[2])


def update(params: Tensors, grads: Tensors, momentum_buffers: Tensors, *rest: Any) -> None:
    """The step that the schema in the op's `__init__` describes."""
    step_over(launch, params, grads, (momentum_buffers,), *rest)


def launch(table: Table, numbers: array[float], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """The step over a table that the caller keeps, with the hyper-parameters of each tensor one after the other."""
    scale, inf = (0 if t is None else t.data_ptr() for t in (grad_scale, found_inf))
    _cpu.channel_sgd(table.count, table.rows, numbers, scale, inf, torch.get_num_threads())
