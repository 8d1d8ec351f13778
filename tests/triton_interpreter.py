"""What tests of Triton kernels without a GPU need: right bf16 arithmetic, counters of launches and bytes, far rows.

Triton 3.7 keeps bf16 as raw uint16 in numpy: `tl.dot` multiplies those bits, and a cast from float32 truncates. Both
are mended here and not in the kernels, which are right on a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from petl_kernels.ops._op import Op
from petl_kernels.profiling.measures import _Counting

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts inside the interpreter")

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


class _Launches(_Counting):
    """Counts inside the operators of this package too: what torch launches around a kernel is not hidden in them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "petl_kernels":
            return super().__torch_dispatch__(func, types, args, kwargs)
        directions = (d for op in Op.registry.values() for d in op.directions.values())
        run = next(d._run for d in directions if d.overload is func)
        with self:
            return run(*args)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count what a GPU would launch inside the block: kernels by their name, torch's operators as "aten::mm"."""
    mode, call = _Launches(), interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        mode.counts[self.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter's own operators
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    try:
        with mode:
            yield mode.counts
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


def recorded_targets(monkeypatch: pytest.MonkeyPatch, implementation: ModuleType) -> list[Tensor]:
    """A list to which `implementation` adds where its kernel writes gradients or, of several groups, partial sums."""
    recorded: list[Tensor] = []
    targets = implementation._targets

    def recording(*args: Any, **kwargs: Any) -> Any:
        found = targets(*args, **kwargs)
        recorded.extend(t for t in found[0] if t is not None)
        return found

    monkeypatch.setattr(implementation, "_targets", recording)
    return recorded


def far_apart(rows: Tensor) -> Tensor:
    """The same matrix with its rows more than 2^31 elements apart, without a gradient."""
    n, d = rows.shape
    stride = 2**31 + 64
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the storage is address space, hardly memory
    try:
        storage = rows.new_empty((n - 1) * stride + d)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    return storage.as_strided((n, d), (stride, 1)).copy_(rows.detach())
