"""Every launch setting of `bottleneck_adapter`: forward with x, with another and without residual, and the backward.

bf16 stands for fp16, which has its width. bf16 beside fp32 parameters takes more of everything than bf16 alone, and
plain fp32 more registers than tf32: the lighter ones are compiled at full tiles of r = 64 only. Where tiles are less
than full, and of activations, the heaviest stand for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.bottleneck_adapter import triton as implementation

KERNELS = 4


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    for activation, size, dtype, parameters, precision in _settings():
        yield precision
        _call(activation, size, dtype, parameters)


def _settings() -> Iterator[tuple[str, tuple[int, int, int], torch.dtype, torch.dtype, str]]:
    """(activation, (n, d, r), dtype, parameters' dtype, float32 precision)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    full = 1 << 16
    for r in (16, 32, 64, 128, 256, 512):
        yield "gelu", (full, 768, r), bf16, fp32, "ieee"
        yield "gelu", (full, 512, r), fp32, fp32, "ieee"
    for r in (64, 512):
        yield "gelu", (5000, 1024, r), bf16, fp32, "ieee"
        yield "gelu", (512, 1024, r), bf16, fp32, "ieee"
        yield "gelu", (512, 1024, r), fp32, fp32, "ieee"
    yield "gelu", (full, 768, 64), bf16, bf16, "ieee"
    yield "gelu", (full, 512, 64), fp32, fp32, "tf32"
    yield "gelu_tanh", (full, 768, 64), bf16, fp32, "ieee"
    yield "gelu", (full, 8192, 64), bf16, fp32, "ieee"
    yield "gelu", (1000, 1000, 100), bf16, fp32, "ieee"
    for r in (64, 512):  # softmax stands for dropout and gate too, which the others go without
        yield "softmax", (full, 768, r), bf16, fp32, "ieee"
        yield "softmax", (full, 512, r), fp32, fp32, "ieee"


def _call(activation: str, size: tuple[int, int, int], dtype: torch.dtype, parameters: torch.dtype) -> None:
    n, d, r = size
    x, z = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up, scale = (torch.empty(k, dtype=parameters) for k in (r, d, d))
    weights = (w_down, b_down, w_up, b_up)
    gate, seed, dropout = None, None, 0.0
    if activation == "softmax":
        gate, seed, dropout = torch.empty(n, 1, dtype=parameters), torch.empty(1, dtype=torch.int64), 0.1
    options = (gate, seed, dropout)
    implementation.forward(x, *weights, x, scale, *options, 1.0, activation, True)
    if gate is None:
        implementation.forward(x, *weights, torch.empty_like(x), None, *options, 2.0, activation, True)
    implementation.backward(x, x, z, *weights, scale, *options, 1.0, activation, True, (*(True,) * 6, gate is not None))
