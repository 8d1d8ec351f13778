"""The launch settings of `norm_adapter`: held or not, narrow and wide bottlenecks, with and without the norm's mean.

bf16 stands for fp16, which has its width, bf16 beside fp32 parameters for bf16 alone, and plain fp32 for tf32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.norm_adapter import triton as implementation

KERNELS = 4


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for d, r, dtype in ((768, 64, bf16), (768, 128, fp32)):
        yield "ieee"
        _call(d, r, dtype, fp32)


def others() -> Iterator[str]:
    """The widest rows that are held, with the widest bottleneck."""
    yield "ieee"
    _call(1024, 128, torch.bfloat16, torch.float32)


def _call(d: int, r: int, dtype: torch.dtype, parameters: torch.dtype) -> None:
    n = 1 << 14
    x, z, rstd = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype), torch.empty(n)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up = torch.empty(r, dtype=parameters), torch.empty(d, dtype=parameters)
    weights = (b_up, b_up, w_down, b_down, w_up, b_up)
    implementation.forward(x, *weights, x, b_up, 1.0, "gelu", "layer", 1e-5, True)
    implementation.backward(x, x, z, rstd, rstd, *weights, b_up, 1.0, "gelu", "layer", True, (True,) * 8)
