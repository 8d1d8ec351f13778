"""Every launch setting of `channel_adapter`: forward and backward, both modes of the scale, one and several tiles of M.

bf16 stands for fp16, which has its width. bf16 beside fp32 parameters takes more of everything than bf16 alone, and
plain fp32 more registers than tf32: the lighter ones are compiled at one width only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.channel_adapter import triton as implementation

KERNELS = 3


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    for size, dtype, parameters, scale_input, precision in _settings():
        yield precision
        _call(size, dtype, parameters, scale_input)


def _settings() -> Iterator[tuple[tuple[int, int, int], torch.dtype, torch.dtype, bool, str]]:
    """((n, d, k), dtype, parameters' dtype, scale_input, float32 precision)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    full = 1 << 16
    for k in (16, 32, 64, 96, 192, 512):
        yield (full, 768, k), bf16, fp32, False, "ieee"
        yield (full, 768, k), fp32, fp32, False, "ieee"
    for n in (5000, 512):
        yield (n, 768, 96), bf16, fp32, False, "ieee"
        yield (n, 768, 96), fp32, fp32, False, "ieee"
    yield (full, 768, 96), bf16, fp32, True, "ieee"
    yield (full, 768, 96), fp32, fp32, True, "ieee"
    yield (full, 768, 96), bf16, bf16, False, "ieee"
    yield (full, 768, 96), fp32, fp32, False, "tf32"
    yield (1000, 1000, 24), bf16, fp32, False, "ieee"


def _call(size: tuple[int, int, int], dtype: torch.dtype, parameters: torch.dtype, scale_input: bool) -> None:
    n, d, k = size
    x, x_channels = torch.empty(n, d, dtype=dtype), torch.empty(n, k, dtype=dtype)
    weight, bias, scale = (torch.empty(shape, dtype=parameters) for shape in ((k, k), (k,), (1,)))
    call = (torch.arange(k), weight, bias, scale, 1.0, scale_input)
    implementation.forward(x, *call, True)
    implementation.backward(x, x_channels, *call, (True,) * 4)
