"""What the Triton implementations share: the device that settings are chosen for, tile widths, dense tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
RAW_BF16 = False
if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    RAW_BF16 = not getattr(InterpreterBuilder, "mended", False)  # as tests/triton_interpreter.py does


class Device(NamedTuple):
    """What launch settings depend on: processors to fill, and lanes per warp (AMD has 64)."""

    processors: int
    warp_size: int


@cache
def device_of(device: torch.device) -> Device:
    """The figures of a device; on the CPU, where the interpreter runs, those of an H100."""
    if device.type != "cuda":
        return Device(132, 32)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def cannot_run(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel can take these (validated) tensors, the first of them deciding the device, or None."""
    present = [t for t in tensors if t is not None]
    if any(t.dtype == torch.float64 for t in present):
        return "it has no float64 kernels; float32, bfloat16 and float16 work"
    where = present[0].device.type
    if where != "cuda" and not (INTERPRETED and where == "cpu"):
        return f"it needs tensors on a GPU, got {where} (or TRITON_INTERPRET=1 set before triton is imported)"
    if RAW_BF16 and any(t.dtype == torch.bfloat16 for t in present):
        return "Triton's interpreter multiplies the raw bits of bfloat16; float32 and float16 work in it"
    return None


def block(wanted: int, size: int) -> int:
    """A tile width of at most `wanted` for a matrix width `size`; 16 is the least that `tl.dot` takes."""
    return max(16, min(wanted, triton.next_power_of_2(size)))


def warps(count: int, device: Device) -> int:
    """`count` warps of 32 lanes, in the device's own."""
    return max(1, count * 32 // device.warp_size)


def precision() -> str:
    """How `tl.dot` multiplies float32: as `torch.backends.cuda.matmul` says for matrix products everywhere."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows(t: Tensor) -> tuple[Tensor, int]:
    """A tensor [..., d] and the stride of its rows; copied only where rows have no single stride or are not dense."""
    if t.is_contiguous():
        return t, t.shape[-1]
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        try:
            return t, t.view(-1, t.shape[-1]).stride(0)
        except RuntimeError:
            pass  # the leading dimensions do not merge
    return t.contiguous(), t.shape[-1]


def dense(t: Tensor | None) -> Tensor | None:
    """The tensor, contiguous; None stays None."""
    return None if t is None else t.contiguous()


def workspace(lengths: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
    """Float32 scratch of these lengths, each part beginning on the 16 bytes that vector accesses want."""
    padded = [(length + 3) // 4 * 4 for length in lengths]
    return like.new_empty(sum(padded), dtype=torch.float32).split(padded)
