"""The soak of `make soak` in short, and that it notices leaks."""

from __future__ import annotations

import ctypes

import pytest
import torch
from soak import grown, soak

STEPS = 100


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_memory_is_flat():
    assert grown(list(soak(STEPS))) == {}


def test_leaks_are_noticed():
    kept: list[torch.Tensor] = []
    malloc = ctypes.CDLL(None).malloc

    def leak() -> None:
        kept.append(torch.zeros(1))
        malloc(1024)

    assert {"objects", "heap"} <= grown(list(soak(STEPS, leak))).keys()
