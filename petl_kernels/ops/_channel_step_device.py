"""The table of an optimizer's step on a GPU, and the step counters there."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from petl_kernels.ops._channel_step import FIELDS, Table

BLOCK = 1024  # elements of a program; csrc/cuda/channel_step.cu has the same


class DeviceTable:
    """A table on its device, uploaded again when an address or a hyper-parameter has changed.

    Attributes:
        rows, numbers: the rows of the table and behind them the hyper-parameters, as int64 and float64.
        programs: the tensor of each program and the first program of that tensor, int64 [programs, 2].
        dtypes: whether any tensor is float32, bfloat16, float16.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        blocks = torch.tensor([-(-size // BLOCK) for size in table.sizes])
        owner = torch.repeat_interleave(torch.arange(table.count), blocks)
        first = blocks.cumsum(0) - blocks
        self.programs = torch.stack([owner, first[owner]], 1).contiguous().to(table.device)
        self.dtypes = tuple(code in table.rows[FIELDS.index("dtype") :: len(FIELDS)] for code in range(3))
        self._uploaded: tuple[array[int], array[float]] | None = None

    def upload(self, numbers: array[float]) -> None:
        """Bring `rows` and `numbers` up to date."""
        rows = self._table.rows
        if self._uploaded != (rows, numbers):
            self._uploaded = (rows[:], numbers[:])
            bits = torch.frombuffer(array("q", rows.tobytes() + numbers.tobytes()), dtype=torch.int64)
            self.rows = bits.to(self._table.device, copy=True)
            self.numbers = self.rows[len(rows) :].view(torch.float64)


@contextmanager
def _counted(steps: Sequence[Tensor], found_inf: Tensor | None) -> Iterator[None]:
    """Count the step before the block and take it back after it where `found_inf` says so; the host does not ask."""
    counted = [t for t in steps if t.numel()]
    if counted:
        torch._foreach_add_(counted, 1)
    yield
    if counted and found_inf is not None:
        torch._foreach_sub_(counted, [(found_inf != 0).to(torch.float32).reshape(())] * len(counted))


@contextmanager
def on_device(table: Table, numbers: array[float], found_inf: Tensor | None) -> Iterator[DeviceTable | None]:
    """A step around the launch that the block makes: with the table on the device, or None where it has no element."""
    if table.count == 0:
        yield None
        return
    if table.on_device is None:
        table.on_device = DeviceTable(table)
    held: DeviceTable = table.on_device
    # The kernel reads the counters after this, and no program waits for another that writes one.
    with _counted(table.steps, found_inf):
        held.upload(numbers)
        yield held if len(held.programs) else None
