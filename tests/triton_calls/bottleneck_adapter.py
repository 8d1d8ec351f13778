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
        modified = activation == "softmax"
        _call(activation, size, dtype, parameters, gate=modified, dropout=modified)
    for activation, size, dtype, dropout in _MODIFIED:
        yield "ieee"
        _call(activation, size, dtype, torch.float32, gate=True, dropout=dropout)


# One modification less can take more registers than all three: with larger tiles some of these spill where those with
# everything do not.
_MODIFIED = (
    ("gelu", (1 << 16, 1024, 64), torch.bfloat16, True),
    ("softmax", (1 << 16, 768, 64), torch.bfloat16, False),
    ("softmax", (1 << 16, 768, 512), torch.bfloat16, False),
    ("softmax", (1 << 16, 512, 32), torch.float32, False),
)


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


def _call(
    activation: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    parameters: torch.dtype,
    gate: bool,
    dropout: bool,
) -> None:
    n, d, r = size
    x, z = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up, scale = (torch.empty(k, dtype=parameters) for k in (r, d, d))
    weights = (w_down, b_down, w_up, b_up)
    factors = torch.empty(n, 1, dtype=parameters) if gate else None
    seed = torch.empty(1, dtype=torch.int64) if dropout else None
    options = (factors, seed, 0.1 if dropout else 0.0)
    implementation.forward(x, *weights, x, scale, *options, 1.0, activation, True)
    if not gate:
        implementation.forward(x, *weights, torch.empty_like(x), None, *options, 2.0, activation, True)
    implementation.backward(x, x, z, *weights, scale, *options, 1.0, activation, True, (*(True,) * 6, gate))
