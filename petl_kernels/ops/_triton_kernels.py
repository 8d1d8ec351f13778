"""What Triton kernels share: the second launch that sums the partial sums of groups of rows, in a fixed order."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_groups(part_ptr, out_ptr, groups, size, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum over p of part[p, i] for one block of i, always in the same order."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, groups, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < groups) & (offsets[None, :] < size)
        total += tl.sum(tl.load(part_ptr + p[:, None].to(tl.int64) * size + offsets[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + offsets, total, mask=offsets < size)


@triton.jit
def sum_all(part_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out[0] = the sum of part, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + offsets, mask=offsets < count, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))
