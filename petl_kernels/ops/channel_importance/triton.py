"""Triton implementation of `channel_importance`: launch settings and entry point over `triton_kernels`.

One launch where one group of rows fills the device, else a second that sums the groups in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from petl_kernels.ops import _triton
from petl_kernels.ops._triton import Device, rows, warps
from petl_kernels.ops.channel_importance import triton_kernels as kernels

_BLOCK_M = 32
_SUM_BLOCK_D = 64
# Groups of which one program of the final sum reads all: more would make that the longer part.
_MAX_GROUPS = 1024


def _settings(d: int, device: Device) -> dict[str, int]:
    """Tiles of 32 rows by up to 128 channels: 32 float32 sums per lane."""
    return dict(BLOCK_M=_BLOCK_M, BLOCK_D=min(128, triton.next_power_of_2(d)), num_warps=warps(4, device))


def _groups(units: int, unit_rows: int, columns: int, device: Device) -> tuple[int, int]:
    """(groups, units of each): four programs per processor, each of at least four tiles of rows."""
    wanted = triton.cdiv(4 * device.processors, columns)
    most = max(1, units * unit_rows // (4 * _BLOCK_M))
    each = triton.cdiv(units, min(wanted, most, units, _MAX_GROUPS))
    return triton.cdiv(units, each), each


def unsupported(activation: Tensor, grad: Tensor, reduction: str) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return _triton.cannot_run(activation, grad)


def forward(activation: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """One pass over both operands; schema in the op's `__init__`."""
    d = activation.shape[-1]
    scores = activation.new_empty((d,), dtype=torch.float32)
    if activation.numel() == 0:
        return scores.zero_()
    n = activation.numel() // d
    samples = activation.shape[0] if activation.dim() > 1 else 1
    activation, stride_am = rows(activation)
    grad, stride_gm = rows(grad)
    device = _triton.device_of(activation.device)
    settings = _settings(d, device)
    columns = triton.cdiv(d, settings["BLOCK_D"])
    if reduction == "sq_sample" and samples == n:
        reduction = "sq_sample_of_rows"
    units = samples if reduction == "sq_sample" else n
    groups, each = _groups(units, n // units, columns, device)
    part = scores if groups == 1 else scores.new_empty((groups, d), dtype=torch.float64)
    with torch.cuda.device_of(activation):
        kernels._channel_importance_fwd_kernel[(columns, groups)](
            activation,
            grad,
            part,
            units,
            each,
            n // units,
            stride_am,
            stride_gm,
            D=d,
            REDUCTION=reduction,
            ONE_GROUP=groups == 1,
            **settings,
        )
        if groups > 1:
            kernels._channel_importance_sum_kernel[(triton.cdiv(d, _SUM_BLOCK_D),)](
                part,
                scores,
                groups,
                D=d,
                SQUARE=reduction == "sq_batch",
                BLOCK_P=16,
                BLOCK_D=_SUM_BLOCK_D,
                num_warps=warps(4, device),
            )
    return scores
