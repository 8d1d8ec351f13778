"""Every launch setting of `channel_importance`: each reduction, of rows and of samples, in each pair of widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petl_kernels.ops.channel_importance import triton as implementation

KERNELS = 2


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for a, g in ((fp32, fp32), (bf16, bf16), (fp32, bf16)):
        for d in (768, 16):
            for reduction in ("sq_batch", "sq_sample", "abs"):
                for leading in ((12608,), (64, 197), (32,)):  # the last is one group
                    yield "ieee"
                    implementation.forward(
                        torch.empty(*leading, d, dtype=a), torch.empty(*leading, d, dtype=g), reduction
                    )
