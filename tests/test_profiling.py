"""The measures of `petl_kernels.profiling` against what can be counted by hand."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petl_kernels import bottleneck_adapter
from petl_kernels.ops._op import Op
from petl_kernels.profiling import ModuleTime, count_launches, module_time, saved_bytes


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(10, 4, requires_grad=True)
    y = torch.randn(10, 4)
    assert saved_bytes(lambda: x * y) == 10 * 4 * 4
    assert saved_bytes(lambda: (x * y) + (x * y.view(4, 10).view(10, 4))) == 10 * 4 * 4
    assert saved_bytes(lambda: x[:2] * y[:2]) == 10 * 4 * 4  # the storage stays, not only the part
    with torch.no_grad():
        assert saved_bytes(lambda: x * y) == 0


def test_saved_bytes_leaves_parameters_out():
    linear, x = nn.Linear(4, 6), torch.randn(10, 4, requires_grad=True)
    both = (10 * 4 + 6 * 4) * 4
    assert saved_bytes(lambda: linear(x)) == both
    assert saved_bytes(lambda: linear(x), exclude=linear.parameters()) == 10 * 4 * 4


def test_saved_bytes_survives_the_backward_pass():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: [(x * torch.randn(100)).sum().backward() for _ in range(3)]) == 3 * 400


def test_saved_bytes_lets_go_of_what_was_saved():
    x, outputs = torch.randn(100, requires_grad=True), []

    def forward() -> None:
        y = x.exp()  # saves its own output
        outputs.append(weakref.ref(y))

    assert saved_bytes(forward) == 400 and outputs[0]() is None


def test_launches_of_forward_and_backward():
    linear, x = nn.Linear(4, 6), torch.randn(10, 4)
    counts = count_launches(lambda: F.relu(linear(x)).t().sum().backward())
    assert counts["aten::addmm"] == 1 and counts["aten::relu"] == 1 and counts["aten::mm"] == 1
    assert not any(name in counts for name in ("aten::t", "aten::expand", "aten::detach", "aten::view"))


def test_an_op_of_this_package_is_one_launch_per_direction():
    x, down, up = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True), torch.randn(8, 2)
    op = Op.registry["bottleneck_adapter"]
    call = op.prepare(x, down, None, up, None, residual=x, activation="relu", scale=1.0)
    usable = [name for name in op.impls[1:] if op.unsupported(name, *call) is None]
    if not usable:
        pytest.skip("only the reference is available here")

    def step() -> None:
        y = bottleneck_adapter(x, down, None, up, None, residual=x, activation="relu", impl=usable[0])
        y.backward(torch.ones_like(y))

    counts = count_launches(step)
    assert counts["petl_kernels::bottleneck_adapter_fwd"] == counts["petl_kernels::bottleneck_adapter_bwd"] == 1
    assert not any("mm" in name for name in counts)


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, grad.sum(), None


class _Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Slow.apply(x, self.weight, self.seconds)


@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_time_of_chosen_modules(input_needs_grad):
    chosen, other = _Sleeper(0.02), _Sleeper(0.03)
    x = torch.randn(4, requires_grad=input_needs_grad)
    for model in (nn.Sequential(chosen, other), nn.Sequential(other, chosen)):
        times = module_time([chosen], lambda model=model: model(x).sum().backward())
        assert times.forward >= 0.02 and times.backward >= 0.04
        assert times.total - times.forward - times.backward >= 0.09  # what the other one takes
        assert times.share == (times.forward + times.backward) / times.total
    assert "forward" not in chosen.__dict__ and not chosen.weight._backward_hooks


def test_time_of_another_method_and_without_backward():
    class Site(_Sleeper):
        def inner(self, x):
            return super().forward(x)

        def forward(self, x):
            time.sleep(0.02)
            return self.inner(x)

    site = Site(0.02)
    with torch.no_grad():
        times = module_time([site], lambda: site(torch.ones(2)), method="inner")
    assert times.forward >= 0.02 and times.total - times.forward >= 0.02 and times.backward == 0
    assert ModuleTime().share == 0


def test_saved_bytes_of_a_sparse_tensor():
    weight = torch.eye(4).to_sparse()
    x = torch.ones(4, 4, requires_grad=True)
    parts = weight._indices().nbytes + weight._values().nbytes
    assert saved_bytes(lambda: torch.sparse.mm(weight, x)) >= parts
