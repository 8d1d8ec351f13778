"""The random numbers of dropout: which elements are kept, as a function of seed, row and column.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the generator of PyTorch and Triton
on GPUs. The counter (c, m, 0), where m has 64 bits, gives four words of 32 bits: those of column c in the rows 4 m to
4 m + 3. An element is kept where the upper 31 bits of its word are at least floor(2^31 p). Kernels evaluate this in the
forward and again in the backward: no mask is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's own generator of the device: `torch.manual_seed` repeats it, and nothing waits for it."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The least 31-bit number that keeps an element."""
    return int(p * 2**31)


def keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The elements that dropout keeps, bool [rows, columns]: the specification of what kernels do."""
    group = torch.arange((rows + 3) // 4, device=seed.device)[:, None]
    column = torch.arange(columns, device=seed.device)[None, :]
    counter = torch.broadcast_tensors(column, group & _LOW, group >> 32, torch.zeros_like(group))
    key = seed.reshape(())
    words = philox(counter, (key & _LOW, (key >> 32) & _LOW))
    return torch.stack(words, 1).flatten(0, 1)[:rows] >> 1 >= threshold(p)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four words of each counter under a key of two; 32-bit numbers in int64 throughout."""
    words, key = list(counter), list(key)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high2, low2 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high2 ^ words[1] ^ key[0], low2, high0 ^ words[3] ^ key[1], low0]
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS)]
    return words


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a b, of which no part passes 63 bits."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _LOW
