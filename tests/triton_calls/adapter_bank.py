"""The launch settings of `adapter_bank`: forward with x and with another residual, and the backward.

Its settings are those of `bottleneck_adapter`, where each is compiled; here the heaviest of either width of x stand for
all, at a rank whose accumulators are one tile and at the largest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.adapter_bank import triton as implementation

KERNELS = 5


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for size, dtype in (
        ((512, 128, 768, 64), bf16),
        ((512, 128, 512, 64), fp32),
        ((512, 128, 768, 512), bf16),
        ((512, 128, 768, 512), fp32),
        ((1, 1, 1000, 100), bf16),  # one sample of one row
    ):
        yield "ieee"
        _call(size, dtype)


def _call(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    samples, n, d, r = size
    x, z = torch.empty(samples, n, d, dtype=dtype), torch.empty(samples, n, r, dtype=dtype)
    task = torch.zeros(samples, dtype=torch.int64)
    w_down, b_down, w_up, b_up = ([torch.empty(shape)] * 16 for shape in ((r, d), (r,), (d, r), (d,)))
    implementation.forward(x, task, w_down, b_down, w_up, b_up, x, 2.0, "gelu", True)
    implementation.forward(x, task, w_down, b_down, w_up, b_up, torch.empty_like(x), 2.0, "gelu", True)
    trained = [True] * 15 + [False]
    implementation.backward(x, x, z, task, w_down, w_up, 2.0, "gelu", True, trained, (True,) * 5)
