"""Every launch setting of `channel_linear`: both dims at each tile that a plan can choose, and the bias alone.

bf16 stands for fp16, which has its width. Operands of two dtypes are multiplied in float32; the largest tiles stand
for the rest there. With dim=0 the bias, which takes more registers, trains too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.channel_linear import triton as implementation

KERNELS = 2

# (n, k, d): between them they choose each of `implementation.TILES`, and tiles narrowed to k = 12 and 24.
# tests/test_triton_channel_linear.py holds them to that.
SIZES = (
    (64, 48, 384),
    (4096, 96, 768),
    (4096, 768, 768),
    (4096, 384, 3072),
    (12608, 96, 768),
    (65536, 48, 768),
    (65536, 24, 768),
    (65536, 12, 768),
)


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dim in (0, 1):
        for size in SIZES:
            for dtype, precision in ((bf16, "ieee"), (fp32, "ieee"), (fp32, "tf32")):
                yield precision
                _call(size, dim, dtype, dtype, fp32)
        yield "ieee"
        _call((64, 48, 384), dim, bf16, bf16, bf16)  # one group, written in the parameters' dtype
        _call((4096, 384, 1000), dim, bf16, bf16, bf16)  # rows that no 16 bytes divide
        _call((4096, 384, 3072), dim, bf16, fp32, fp32)
        _call((4096, 384, 3072), dim, fp32, bf16, bf16)
    for dtype in (bf16, fp32):
        for size in ((64, 48, 384), (4096, 384, 3072)):
            _call(size, 0, dtype, None, fp32)


def _call(
    size: tuple[int, int, int], dim: int, dtype: torch.dtype, x_dtype: torch.dtype | None, parameters: torch.dtype
) -> None:
    """One backward of g in `dtype`; without a dtype of x, of the bias alone."""
    n, k, d = size
    g = torch.empty(n, d, dtype=dtype)
    x = None if x_dtype is None else torch.empty(n, d if dim == 0 else k, dtype=x_dtype)
    channels = torch.empty(k, dtype=torch.int64)
    weight = torch.empty((k, d) if dim == 0 else (d, k), dtype=parameters)
    bias = torch.empty(k, dtype=parameters) if dim == 0 else None
    implementation.backward(g, x, channels, weight, bias, dim, (x is not None, dim == 0))
