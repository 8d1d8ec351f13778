"""The Triton kernels of `adapter_bank` without a GPU: launches, tasks that do not exist, pieces of any batch."""

from __future__ import annotations

import pytest
import torch

from petl_kernels import adapter_bank
from petl_kernels.testing import CASES, check

pytest.importorskip("triton")

from triton_interpreter import count_launches, interpreted

from petl_kernels.ops import _triton
from petl_kernels.ops.adapter_bank import triton as implementation

CASE = next(case for case in CASES if case.name == "adapter_bank")


def arguments(samples=6, tokens=20, d=48, r=16, tasks=3, trains=True):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    lists = [[tensor(*shape).requires_grad_(trains) for _ in range(tasks)] for shape in ((r, d), (r,), (d, r), (d,))]
    return tensor(samples, tokens, d).requires_grad_(), torch.arange(samples) % tasks, *lists


@interpreted
@pytest.mark.parametrize(("trains", "launches"), [(True, 4), (False, 3)])
def test_launches_do_not_depend_on_the_batch(trains, launches):
    x, task, *lists = arguments(trains=trains)
    for of in (task, torch.zeros_like(task)):
        with torch.no_grad():
            adapter_bank(x, of, *lists, residual=x, impl="triton")  # the addresses are uploaded once
        with count_launches() as forward:
            y = adapter_bank(x, of, *lists, residual=x, impl="triton")
        g = torch.ones_like(y)
        wanted = [x, *(p for each in lists for p in each)] if trains else [x]
        with count_launches() as backward:
            torch.autograd.grad(y, wanted, g)
        assert forward.total() == 1, forward
        kernels = {name: count for name, count in backward.items() if not name.startswith("aten::")}
        assert sum(kernels.values()) == launches and backward.total() - launches <= 2, backward


@interpreted
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_task_that_does_not_exist_makes_nan_of_its_sample_alone(wrong, monkeypatch):
    """As on a GPU, where nobody reads `task` before."""
    monkeypatch.setattr("petl_kernels.ops.adapter_bank.validation.check_range", lambda *a: None)
    x, task, *lists = arguments()
    bad = task.clone()
    bad[2] = wrong
    y = adapter_bank(x, bad, *lists, residual=x, impl="triton")
    assert y[2].isnan().all() and y.isnan().sum() == y[2].numel()
    grads = torch.autograd.grad(y, [x, *lists[0], *lists[3]], torch.ones_like(y))
    assert grads[0][2].isnan().all() and grads[0].isnan().sum() == y[2].numel()
    kept = [i for i in range(6) if i != 2]
    fine = adapter_bank(x[kept], task[kept], *lists, residual=x[kept], impl="triton")
    for got, wanted in zip(grads[1:], torch.autograd.grad(fine, [*lists[0], *lists[3]], torch.ones_like(fine))):
        assert torch.equal(got, wanted)


@interpreted
@pytest.mark.parametrize("per", ["sample", "token"])
def test_several_pieces_of_a_task(per, monkeypatch):
    """Pieces of 64 rows where tasks have hundreds of them, more than are summed at once; and samples beyond one axis of
    the grid.
    """
    monkeypatch.setattr(_triton, "device_of", lambda device: _triton.Device(1 << 20, 32))
    monkeypatch.setattr(implementation, "_GRID_AXIS", 4)
    call = CASE.inputs(dict(n=9, d=32, r=4, tasks=2, tokens=(140,) if per == "sample" else (20,), per=per))
    assert check(CASE, call, impl="triton") == []
