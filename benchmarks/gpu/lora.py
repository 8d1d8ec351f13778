"""LoRA as NeMo Automodel computes it, written anew: the kernel that ours are compared with on a call of LoRA's form.

Forward: a program takes a tile of rows through both products, `(x A^T) B^T`, and the base layer's output is added
afterwards. Backward: the same kernel makes dz and dx, a matmul dA, and a third kernel dB from x A^T, which is computed
again: only x, A and B are saved. Ours differ in what they save (z), in where the residual is added (in the
kernel) and in sharing the passes over x and g.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    from gpu import lora_kernels as kernels
else:
    kernels = None  # type: ignore[assignment]

ROWS, WIDTH = 64, 64


def runs_on(kind: str) -> bool:
    """Whether the kernels can be launched: on a GPU, or in Triton's interpreter."""
    return kernels is not None and (kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _next_power(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())


def two_gemm(x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`scale (x a^T) b^T` and `scale x a^T`, x [n, k], a [r, k] and b [m, r] of any strides."""
    (n, k), (m, r) = x.shape, b.shape
    y, h = x.new_empty((n, m)), x.new_empty((n, r))
    rows = ROWS if r <= 64 else ROWS // 2
    tiles = dict(BLOCK_N=rows, BLOCK_D=WIDTH, BLOCK_R=_next_power(r), num_warps=4 if r <= 64 else 8, num_stages=2)
    strides = (x.stride(0), x.stride(1), *a.stride(), *b.stride())
    kernels.two_gemm[(-(-n // rows),)](x, a, b, y, h, *strides, n, k, r, m, scale, **tiles)  # type: ignore[arg-type]
    return y, h


def gradient(x: Tensor, a: Tensor, g: Tensor, scale: float) -> Tensor:
    """`scale g^T (x a^T)`, [m, r], over groups of rows that fill a GPU; a matmul makes the factor anew."""
    (n, m), r = g.shape, a.shape[0]
    slabs = -(-m // WIDTH)
    groups = max(1, min(-(-n // 256), 264 // slabs))
    parts = x.new_empty((groups, m, r), dtype=torch.float32)
    tiles = dict(BLOCK_N=ROWS // 2, BLOCK_D=WIDTH, BLOCK_R=_next_power(r), num_warps=4 if r <= 64 else 8, num_stages=2)
    kernels.product_over_rows[(slabs, groups)](g, x @ a.t(), parts, *g.stride(), n, m, r, scale, **tiles)  # type: ignore[arg-type]
    return parts.sum(0).to(g.dtype)


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        return two_gemm(x, a, b, scale)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        dx, dz = two_gemm(g, b.t(), a.t(), ctx.scale)
        return dx, dz.t() @ x, gradient(x, a, g, ctx.scale), None


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: None,
    w_up: Tensor,
    b_up: None,
    *,
    residual: Tensor,
    activation: str = "identity",
    scale: float = 1.0,
    impl: None = None,
) -> Tensor:
    """LoRA as a call of `petl_kernels.bottleneck_adapter`: no biases, no activation, the base output as residual."""
    y: Any = _LoRA.apply(x.flatten(0, -2), w_down, w_up, scale)
    return y.view(residual.shape).add_(residual)
