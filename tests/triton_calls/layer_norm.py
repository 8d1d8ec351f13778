"""Every launch setting of `layer_norm`: each width of a block of rows, each set of gradients at the widest and at 768.

bf16 stands for fp16, which has its width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.layer_norm import triton as implementation

KERNELS = 3


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, parameters in ((fp32, fp32), (bf16, bf16), (bf16, fp32)):
        for d in (16, 96, 384, 768, 1024, 2048, 4096, 8192):
            yield "ieee"
            _call(12608, d, dtype, parameters, (True,) * 3)
        for d in (768, 8192):
            yield "ieee"
            _call(16, d, dtype, parameters, (True,) * 3)  # one group
            for needs in ((True, False, False), (False, True, True), (False, False, True)):
                _call(12608, d, dtype, parameters, needs)


def _call(n: int, d: int, dtype: torch.dtype, parameters: torch.dtype, needs: tuple[bool, ...]) -> None:
    x, weight, mean = torch.empty(n, d, dtype=dtype), torch.empty(d, dtype=parameters), torch.empty(n)
    implementation.forward(x, weight, weight, 1e-5, True)
    implementation.forward(x, None, None, 1e-5, False)
    implementation.backward(x, x if any(needs[:2]) else None, mean, mean, weight, weight, needs)
