"""What the CUDA optimizers share: their launch."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from torch import Tensor

from petl_kernels.ops._channel_step import Table
from petl_kernels.ops._channel_step_device import on_device
from petl_kernels.ops._cuda import launch_on


def launch_over(
    table: Table,
    kernel: Callable[..., None],
    numbers: array[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Count the step and run `kernel`, of `petl_kernels._cuda`, over every element of every tensor of `table`."""
    with on_device(table, numbers, found_inf) as held:
        if held is None:
            return
        scale, inf = (0 if t is None else t.data_ptr() for t in (grad_scale, found_inf))
        addresses = (t.data_ptr() for t in (held.rows, held.numbers, held.programs))
        kernel(launch_on(table.device), *addresses, len(held.programs), scale, inf)
