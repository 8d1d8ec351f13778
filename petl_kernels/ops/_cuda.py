"""The torch-free CUDA extension, and what its launches need to know."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from petl_kernels.ops._assume import assume_constant

try:
    from petl_kernels import _cuda
except ImportError as error:
    raise ImportError(f"petl_kernels has no CUDA kernels here (`petl-kernels env` says why): {error}") from error

__all__ = ["Workspace", "_cuda", "addable", "cannot_run", "capability", "launch_on", "too_wide"]

Launch = tuple[int, int, int, int, bool]


@assume_constant
@cache
def capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@assume_constant
@cache
def _too_old(index: int | None) -> str | None:
    """Why the kernels do not run on a CUDA device, or None. Not traceable, hence a constant to a compiler."""
    if torch.version.hip is not None:
        return "it is CUDA, and this PyTorch was built for ROCm"
    major, minor = capability(index)
    return None if major >= 8 else f"it needs compute capability 8.0 or more, got {major}.{minor}"


def cannot_run(*tensors: Tensor | None) -> str | None:
    """Why no CUDA kernel can take these (validated) tensors, the first of them deciding the device, or None."""
    present = [t for t in tensors if t is not None]
    if present[0].device.type != "cuda":
        return f"it needs tensors on a GPU, got {present[0].device.type}"
    if any(t.dtype == torch.float64 for t in present):
        return "it has no float64 kernels; float32, bfloat16 and float16 work"
    return _too_old(present[0].device.index)


def too_wide(x: Tensor, w_down: Tensor) -> str | None:
    """Why no kernel by rows can take a bottleneck, or None: h and two slabs of weights have to fit 99 KiB."""
    widest = 224 if x.dtype == torch.float32 else 256
    if w_down.shape[0] <= widest:
        return None
    return f"its bottleneck is at most {widest} wide in {x.dtype}, got r = {w_down.shape[0]}"


def addable(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """A residual as the kernels add it, which know one dtype of rows: a narrower one is widened.

    None for a wider one, too, which is added to the rounded branch, as eager adds it.
    """
    if residual is None or residual.dtype == x.dtype:
        return residual
    return residual.to(x.dtype) if torch.promote_types(x.dtype, residual.dtype) == x.dtype else None


@cache
def _figures(index: int) -> tuple[int, int]:
    """Processors of a device, and the shared memory that a block may ask for."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def launch_on(device: torch.device) -> Launch:
    """Device, current stream, processors, shared memory, and whether float32 products may be computed in tf32."""
    index = device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    return index, stream, *_figures(index), torch.backends.cuda.matmul.fp32_precision == "tf32"


class Workspace:
    """What a binding calls for the scratch memory of its launches; torch's allocator keeps it for their stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, count: int) -> int:
        """The address of `count` bytes, which live until the binding has returned."""
        self._memory = torch.empty(count, dtype=torch.uint8, device=self._device)
        return self._memory.data_ptr()
