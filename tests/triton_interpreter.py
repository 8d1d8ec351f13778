"""What Triton's interpreter lacks for these tests: right bf16 arithmetic, and counters of launches and bytes.

Triton 3.7 keeps bf16 as raw uint16 in numpy: `tl.dot` multiplies those bits, and a cast from float32 truncates. Both
are mended here and not in the kernels, which are right on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bf16, as its bits (uint16)."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def install() -> None:
    """Mend the interpreter, for the rest of the process; harmless where a later Triton has mended itself."""
    if getattr(_Builder, "mended", False):
        return
    dot, cast = _Builder.create_dot, _Builder.cast_impl

    def operand(handle: _Handle) -> _Handle:
        if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
            return _Handle(widen(handle.data), tl.float32)
        return handle

    def create_dot(self, a, b, d, *options):
        return dot(self, operand(a), operand(b), d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return _Handle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def restore_only_from_devices(self, args_dev, args_hst, *rest):
        # On the CPU host copies share the storage: copying it onto itself would touch every page of it.
        if any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in args_dev):
            restore(self, args_dev, args_hst, *rest)

    restore = interpreter.GridExecutor._restore_args_dev
    interpreter.GridExecutor._restore_args_dev = restore_only_from_devices
    _Builder.create_dot, _Builder.cast_impl = create_dot, cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(_Builder, f"create_{name}", lambda self, src, dst_type: self.cast_impl(src, dst_type))
    _Builder.mended = True


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count kernel launches inside the block, by kernel name."""
    launches: Counter[str] = Counter()
    call = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launches[self.fn.__name__] += 1
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    try:
        yield launches
    finally:
        interpreter.GridExecutor.__call__ = call


@dataclass
class Traffic:
    """The loads and stores of kernels: for each the lowest address and the bytes of its active lanes."""

    accesses: list[tuple[int, int]] = field(default_factory=list)

    def within(self, *tensors: Tensor) -> int:
        """Bytes requested of these contiguous tensors."""
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        return sum(size for address, size in self.accesses if any(start <= address < end for start, end in spans))

    @property
    def total(self) -> int:
        return sum(size for _, size in self.accesses)


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Record what kernels load and store inside the block. Masked lanes request nothing."""
    traffic = Traffic()
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def record(pointers: _Handle, mask: _Handle) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape)
        if active.any():
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.accesses.append((int(pointers.data[active].min()), int(active.sum()) * size))

    def recording_load(self, ptrs, mask, *rest):
        record(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def recording_store(self, ptrs, value, mask, *rest):
        record(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    _Builder.create_masked_load, _Builder.create_masked_store = recording_load, recording_store
    try:
        yield traffic
    finally:
        _Builder.create_masked_load, _Builder.create_masked_store = load, store
