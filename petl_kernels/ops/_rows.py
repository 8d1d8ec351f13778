"""Tensors as the compiled kernels take them: address, dtype and row stride."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[int, int, int]

# As csrc/petl.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


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
    return t.data_ptr(), DTYPES[t.dtype], t.stride(0) if dims == 2 else t.shape[-1] if dims else 1
