"""`channel_adamw_` on the CUDA kernels of `petl_kernels._cuda`: one launch for all tensors of a device."""

from __future__ import annotations

from array import array
from typing import Any

from torch import Tensor

from petl_kernels.ops._channel_step import Table, Tensors, cannot_walk, step_over
from petl_kernels.ops._channel_step_cuda import launch_over
from petl_kernels.ops._cuda import _cuda, cannot_run


def unsupported(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, *rest: Any) -> str | None:
    """Why this call cannot run, or None."""
    reason = cannot_run(*params) if params else None
    return reason or cannot_walk(params, grads, (exp_avgs, exp_avg_sqs), rest[1], rest[2])


def update(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, *rest: Any) -> None:
    """The step that the schema in the op's `__init__` describes."""
    step_over(launch, params, grads, (exp_avgs, exp_avg_sqs), *rest)


def launch(table: Table, numbers: array[float], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """The step over a table that the caller keeps, with the hyper-parameters of each tensor one after the other."""
    launch_over(table, _cuda.channel_adamw, numbers, grad_scale, found_inf)
