"""The torch-free CPU extension, and tensors as it takes them: address, dtype and row stride."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from petl_kernels import _cpu
except ImportError as error:
    raise ImportError(f"petl_kernels has no C++ kernels here (`petl-kernels env` says why): {error}") from error

ENV_ISA = "PETL_KERNELS_CPU_ISA"
if ENV_ISA in os.environ:
    _cpu.set_isa(os.environ[ENV_ISA])

Rows = tuple[int, int, int]

_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NOTHING = {dtype: torch.empty(0, dtype=dtype, device=_CPU) for dtype in _DTYPES}


def row_major(t: Tensor | None) -> Tensor | None:
    """`t`, or a copy of it, as rows the kernels can walk: contiguous elements, one stride between rows."""
    if t is None or t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1):
        return t
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rows(t: Tensor | None) -> Rows | None:
    """Address, dtype and row stride (elements) of what `row_major` returned; a vector is one row."""
    if t is None:
        return None
    dims = t.dim()
    return t.data_ptr(), _DTYPES[t.dtype], t.stride(0) if dims == 2 else t.shape[-1] if dims else 1


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, whatever torch's default device is."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def nothing(dtype: torch.dtype) -> Tensor:
    """The empty tensor that stands for an output nobody needs; after a pattern, which saves a third of its 1.6 us."""
    return torch.empty_like(_NOTHING[dtype])


def empty_like(t: Tensor) -> Tensor:
    """Contiguous memory of the shape and dtype of `t`; for a contiguous `t` in two thirds of the time of `empty`."""
    return torch.empty_like(t) if t.is_contiguous() else empty(t.shape, t.dtype)


def new_gradients(parameters: Sequence[Tensor | None], needs: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """Memory for the gradient of each parameter; where none is needed the empty tensor of `dtype`."""
    return [empty_like(p) if need and p is not None else nothing(dtype) for p, need in zip(parameters, needs)]
