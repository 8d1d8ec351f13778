"""`adapter_bank` on the CPU kernels of `petl_kernels._cpu`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._native import _cpu, empty, empty_like, nothing, row_major, rows
from petl_kernels.ops._rows import DTYPES
from petl_kernels.ops.adapter_bank import gradient_shapes
from petl_kernels.ops.bottleneck_adapter.reference import CODES

Tensors = Sequence[Tensor]


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Why this call cannot run, or None: any dtype and shape does, on the CPU."""
    return None if x.device.type == "cpu" else f"it runs on the CPU, and x is on {x.device}"


def _table(*lists: Tensors) -> array[int]:
    """Four addresses per task, those of an empty list 0."""
    tasks = len(lists[0])
    addresses = array("q", bytes(8 * 4 * tasks))
    for i, tensors in enumerate(lists):
        if tensors:
            addresses[i::4] = array("q", [t.data_ptr() for t in tensors])
    return addresses


def _dense(tensors: Tensors) -> Tensors:
    return [t.contiguous() for t in tensors]


def forward(
    x: Tensor,
    task: Tensor,
    w_down: Tensors,
    b_down: Tensors,
    w_up: Tensors,
    b_up: Tensors,
    residual: Tensor | None,
    scale: float,
    activation: str,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """One pass over x: y, and z when it is to be saved; schema in the op's `__init__`."""
    *leading, d_in = x.shape
    d_out, r = w_up[0].shape
    dtype = x.dtype
    if residual is not None and residual.dtype is not dtype:
        dtype = torch.promote_types(dtype, residual.dtype)
        residual = residual.to(dtype)
    y = empty_like(x) if d_in == d_out and dtype == x.dtype else empty((*leading, d_out), dtype)
    z = empty((*leading, r), x.dtype) if save_z else nothing(x.dtype)
    if y.numel() == 0:
        return y, z
    inputs, task = [row_major(x), row_major(residual)], task.contiguous()
    lists = [_dense(tensors) for tensors in (w_down, b_down, w_up, b_up)]
    samples = task.numel()
    _cpu.adapter_bank_forward(
        (samples, y.numel() // d_out // samples, d_in, r, d_out, len(w_down)),
        task.data_ptr(),
        _table(*lists),
        DTYPES[w_down[0].dtype],
        *map(rows, inputs),
        scale,
        CODES[activation],
        rows(y),
        rows(z) if save_z else None,
        torch.get_num_threads(),
    )
    return y, z


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    task: Tensor,
    w_down: Tensors,
    w_up: Tensors,
    scale: float,
    activation: str,
    add_g: bool,
    trained: Sequence[bool],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """One pass over g and x: the gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    d_in, (d_out, r), own = w_down[0].shape[1], w_up[0].shape, w_down[0].dtype
    dx = empty((*g.shape[:-1], d_in), z.dtype) if needs[0] else nothing(z.dtype)
    shapes = gradient_shapes(sum(trained), w_down[0], w_up[0])
    stacks = [empty(shape, own) if need else nothing(z.dtype) for shape, need in zip(shapes, needs[1:])]
    if g.numel() == 0:
        return dx, *(stack.zero_() for stack in stacks)
    inputs, task = [row_major(g), row_major(x), row_major(z) if z.numel() else None], task.contiguous()
    lists = [_dense(w_down), (), _dense(w_up), ()]
    samples = task.numel()
    _cpu.adapter_bank_backward(
        (samples, g.numel() // d_out // samples, d_in, r, d_out, len(w_down)),
        task.data_ptr(),
        _table(*lists),
        _gradient_table(stacks, needs[1:], trained),
        DTYPES[own],
        *map(rows, inputs),
        scale,
        CODES[activation],
        add_g,
        rows(dx) if needs[0] else None,
        torch.get_num_threads(),
    )
    return dx, *stacks


def _gradient_table(stacks: Tensors, needs: Sequence[bool], trained: Sequence[bool]) -> array[int]:
    """Where each task's gradients go: to the next entry of every stack needed; 0 for a task that does not train."""
    addresses = array("q", bytes(8 * 4 * len(trained)))
    for i, (stack, need) in enumerate(zip(stacks, needs)):
        if need:
            places = iter(range(stack.data_ptr(), stack.data_ptr() + stack.nbytes, stack[0].nbytes))
            addresses[i::4] = array("q", [next(places) if train else 0 for train in trained])
    return addresses
