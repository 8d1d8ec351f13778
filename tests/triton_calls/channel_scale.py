"""Every launch setting of `channel_scale`: each width of a tile, whole and ragged, and each set of gradients.

bf16 stands for fp16, which has its width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.channel_scale import triton as implementation

KERNELS = 3


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, parameters in ((fp32, fp32), (bf16, bf16), (bf16, fp32)):
        for d in (16, 30, 61, 128, 250, 768, 3072, 11008):
            for n in (16, 12608):  # one group, and many
                yield "ieee"
                _call(n, d, dtype, parameters)


def _call(n: int, d: int, dtype: torch.dtype, parameters: torch.dtype) -> None:
    x, scale = torch.empty(n, d, dtype=dtype), torch.empty(d, dtype=parameters)
    implementation.forward(x, scale)
    for needs in ((True, True), (False, True), (True, False)):
        implementation.backward(x, x if needs[1] else None, scale, needs)
