"""Every launch setting of `channel_adamw_`: each dtype alone and all of them together, with and without scaling."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.channel_adamw import triton as implementation

KERNELS = 1


def calls() -> Iterator[str]:
    """Make each call after yielding a float32 precision, which has no bearing on it."""
    single = torch.ones(())
    for dtypes in ([torch.float32], [torch.bfloat16], [torch.float16], [torch.float32, torch.bfloat16, torch.float16]):
        params = [torch.empty(64, 96, dtype=dtype) for dtype in dtypes]
        numbers = [[0.1] * len(params)] * 5 + [[False] * len(params)]
        for scaling in ((None, None), (single, single)):
            yield "ieee"
            states = [[torch.empty_like(p) for p in params] for _ in range(3)]
            steps, nothing = [torch.zeros(()) for _ in params], [None] * len(params)
            implementation.update(params, *states, steps, nothing, [0] * len(params), *numbers, *scaling)
