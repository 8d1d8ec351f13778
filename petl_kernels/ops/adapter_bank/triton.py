"""Triton implementation of `adapter_bank`: launch settings and entry points over `triton_kernels`.

One launch forward, four backward whatever the batch holds, three if no parameter trains: dz by rows, the order of the
samples by task, dx and the parameters' gradients by slabs of channels over pieces of that order, and the sum of each
task's pieces in a fixed order. No atomics: results are bit-identical from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._triton import block, dense, rows, workspace
from petl_kernels.ops.adapter_bank import gradient_shapes
from petl_kernels.ops.adapter_bank import triton_kernels as kernels
from petl_kernels.ops.bottleneck_adapter.triton import _MAX_RANK, _held_slabs, _row_settings, _slab_settings

_MAX_TASKS = 4096  # of whose counts each program holds a vector
_MAX_HELD = 5  # slabs: a sixth spills on sm_80 beside the addresses
_ORDER_BLOCK = 64
_SUM_BLOCK = 512
_GRID_AXIS = 65535
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Tensors = Sequence[Tensor]


def unsupported(x: Tensor, task: Tensor, w_down: Tensors, *_: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if w_down[0].shape[0] > _MAX_RANK:
        return f"its bottleneck is at most {_MAX_RANK} wide, got r = {w_down[0].shape[0]}"
    if len(w_down) > _MAX_TASKS:
        return f"it takes at most {_MAX_TASKS} tasks, got {len(w_down)}"
    return _triton.cannot_run(x, w_down[0])


@lru_cache(maxsize=1024)
def _uploaded(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on a device, there since they were first asked for: addresses of parameters hardly ever change.

    From memory that is not pinned such a copy is staged by the driver, and the host does not wait for the device.
    """
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _table(device: torch.device, *lists: Tensors) -> tuple[Tensor, bool]:
    """A row of four addresses per task, 0 for those of an empty list, and whether they are multiples of 16 bytes."""
    tasks = max(map(len, lists))
    columns = [[t.data_ptr() for t in tensors] or [0] * tasks for tensors in lists]
    numbers = tuple(address for row in zip(*columns) for address in row)
    return _uploaded(numbers, device), all(address % 16 == 0 for address in numbers)


def _gathering(settings: dict[str, int], r: int, itemsize: int) -> dict[str, int]:
    """bottleneck_adapter's slabs with room for the addresses of gathered rows, or these spill on sm_80 and sm_90."""
    if itemsize == 4:
        return dict(settings, num_stages=1)
    return dict(settings, BLOCK_M=16) if r > settings["BLOCK_R"] else settings


def _grid(row_blocks: int, samples: int) -> tuple[int, int, int]:
    """Programs per sample and all samples, over as many axes as these need."""
    return row_blocks, min(samples, _GRID_AXIS), triton.cdiv(samples, _GRID_AXIS)


def _piece_rows(total: int, d: int, r: int, device: _triton.Device, settings: dict[str, int]) -> int:
    """Rows of a piece: enough pieces to fill the device, of at least 4 r rows each, since they leave sums behind."""
    programs = triton.cdiv(d, settings["BLOCK_D"]) * triton.cdiv(r, settings["BLOCK_R"])
    wanted = triton.cdiv(total, triton.cdiv(device.processors, programs))
    return triton.cdiv(max(wanted, 4 * max(r, 16)), settings["BLOCK_M"]) * settings["BLOCK_M"]


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
    """y [..., d_out] and z [..., r] (empty unless `save_z`); shapes and dtypes as in the op's schema."""
    (r, d_in), d_out = w_down[0].shape, w_up[0].shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], d_out), dtype=dtype)
    z = x.new_empty((*x.shape[:-1], r) if save_z else (0,))
    if y.numel() == 0:
        return y, z
    samples = task.numel()
    n = y.numel() // d_out // samples
    sequential = residual is x
    x, stride_xm = rows(x)
    device = _triton.device_of(x.device)
    # As many rows as the sample has decide the tile, as many as there are in all whether the device is full.
    settings = _row_settings(samples * n, d_in, r, x.element_size(), device)
    settings["BLOCK_M"] = min(settings["BLOCK_M"], block(64, n))
    held = min(_held_slabs(d_in, x.element_size(), settings), _MAX_HELD) if sequential else 0
    if held:
        settings["BLOCK_D"] = block(128, d_in)
    if sequential:
        residual, stride_rm = x, stride_xm
    else:
        residual, stride_rm = (None, 0) if residual is None else rows(residual)
    lists = [[t.contiguous() for t in tensors] for tensors in (w_down, b_down, w_up, b_up)]
    with torch.cuda.device_of(x):
        table, aligned = _table(x.device, *lists)
        kernels._adapter_bank_fwd_kernel[_grid(triton.cdiv(n, settings["BLOCK_M"]), samples)](
            x,
            dense(task),
            table,
            residual,
            y,
            z if save_z else None,
            samples,
            n,
            len(w_down),
            stride_xm,
            stride_rm,
            float(scale),
            D_IN=d_in,
            D_OUT=d_out,
            R=r,
            B_DOWN=bool(b_down),
            B_UP=bool(b_up),
            DTYPE=_DTYPES[w_down[0].dtype],
            ALIGNED=aligned,
            ACTIVATION=activation,
            PRECISION=_triton.precision(),
            HELD=held,
            **settings,
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
    """dx and the stacked gradients of (w_down, b_down, w_up, b_up); an empty tensor for each that is not needed."""
    (r, d_in), d_out, own = w_down[0].shape, w_up[0].shape[0], w_down[0].dtype
    d, samples, tasks = max(d_in, d_out), task.numel(), len(w_down)
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    shapes = gradient_shapes(sum(trained), w_down[0], w_up[0])
    stacks = [z.new_empty(s, dtype=own) if need else z.new_empty((0,)) for s, need in zip(shapes, needs[1:])]
    if g.numel() == 0:
        return dx, *(stack.zero_() for stack in stacks)
    n = g.numel() // d_out // samples
    g, stride_gm = rows(g)
    x, stride_xm = rows(x) if x is not None and needs[1] else (None, 0)
    task, alpha = task.contiguous(), float(scale)
    device, itemsize = _triton.device_of(g.device), z.element_size()
    w_down, w_up = [t.contiguous() for t in w_down], [t.contiguous() for t in w_up]
    by_slabs = _gathering(_slab_settings(d, r, itemsize, device), r, itemsize)
    chunks = triton.cdiv(r, by_slabs["BLOCK_R"])
    piece_rows = _piece_rows(samples * n, d, r, device, by_slabs)
    pieces = samples * n // piece_rows + tasks  # the most that any batch has
    sizes: dict[str, Any] = dict(D_IN=d_in, D_OUT=d_out, R=r)
    common: dict[str, Any] = dict(sizes, ACTIVATION=activation, PRECISION=_triton.precision(), DTYPE=_DTYPES[own])
    by_tasks = dict(BLOCK_T=block(_MAX_TASKS, tasks))
    with torch.cuda.device_of(g):
        table, common["ALIGNED"] = _table(g.device, w_down, (), w_up, ())
        which = None if all(trained) else _uploaded(_entries(trained), g.device)
        dz = torch.empty_like(z) if any(needs[:3]) else None
        if dz is not None:
            by_rows = _row_settings(samples * n, d_out, r, itemsize, device)
            by_rows["BLOCK_M"] = min(by_rows["BLOCK_M"], block(64, n))
            kernels._adapter_bank_bwd_dz_kernel[_grid(triton.cdiv(n, by_rows["BLOCK_M"]), samples)](
                g,
                z,
                task,
                table,
                dz,
                dx if needs[0] else None,
                samples,
                n,
                tasks,
                stride_gm,
                alpha,
                **common,
                **by_rows,
            )
        places = task.new_empty((samples + tasks + 1,), dtype=torch.int32)
        order, first = places.split((samples, tasks + 1))
        kernels._adapter_bank_bwd_order_kernel[(triton.cdiv(max(samples, tasks + 1), _ORDER_BLOCK), 2)](
            task, order, first, samples, tasks, BLOCK=_ORDER_BLOCK
        )
        entries = [shape[1:].numel() if need else 0 for shape, need in zip(map(torch.Size, shapes), needs[1:])]
        scratch = workspace([pieces * count for count in entries], g)
        parts = [part if count else None for part, count in zip(scratch, entries)]
        kernels._adapter_bank_bwd_slab_kernel[(triton.cdiv(d, by_slabs["BLOCK_D"]), pieces, chunks)](
            g,
            x,
            z,
            dz,
            table,
            which,
            order,
            first,
            dx if needs[0] else None,
            *parts,
            samples,
            n,
            tasks,
            piece_rows,
            stride_gm,
            stride_xm,
            alpha,
            ADD_G=add_g,
            **common,
            **by_tasks,
            **by_slabs,
        )
        if any(entries):
            kernels._adapter_bank_bwd_sum_kernel[(triton.cdiv(max(entries), _SUM_BLOCK), 4, tasks)](
                *parts, which, first, *stacks, n, tasks, piece_rows, BLOCK_P=8, BLOCK=_SUM_BLOCK, **sizes, **by_tasks
            )
    return dx, *stacks


def _entries(trained: Sequence[bool]) -> tuple[int, ...]:
    """Which entry of a stack is each task's; -1 for one that does not train."""
    count = 0
    entries = []
    for train in trained:
        entries.append(count if train else -1)
        count += train
    return tuple(entries)
