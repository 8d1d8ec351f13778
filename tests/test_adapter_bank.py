"""What only `adapter_bank` has: bad input, tasks that freeze, batches of blocks that are gathered and that are not."""

from __future__ import annotations

import pytest
import torch
from table import check_refused, device, kernels, setting

from petl_kernels import adapter_bank, bottleneck_adapter
from petl_kernels.testing import CASES, check

CASE = next(case for case in CASES if case.name == "adapter_bank")
KERNELS = kernels(CASE)
B, D, R, T = 3, 8, 4, 2
t = torch.zeros


def good(**changed):
    call = dict(
        x=t(B, 5, D),
        task=t(B, dtype=torch.int64),
        w_down=[t(R, D)] * T,
        b_down=[t(R)] * T,
        w_up=[t(D, R)] * T,
        b_up=[t(D)] * T,
        residual=t(B, 5, D),
        scale=1.0,
    )
    return call | changed


BAD = {
    "x-list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x-rank": (dict(x=t(())), ValueError, r"x must be \[..., d_in\]"),
    "x-width": (dict(x=t(B, 5, D + 1)), ValueError, r"w_down\[0\] must be \[r, d_in\] = \[4, 9\], got \[4, 8\]"),
    "zero-dim": (dict(w_down=t(())), TypeError, "w_down must be a tensor per task, in a list or stacked, got Tensor"),
    "dict": (dict(b_up={}), TypeError, "b_up must be a tensor per task, in a list or stacked, got dict"),
    "no-tasks": (dict(w_down=[]), ValueError, "w_down must have at least one task"),
    "not-tensors": (dict(w_up=[1.0, 2.0]), ValueError, r"w_up\[0\] must be a tensor \[d_out, r\], got float"),
    "empty": (dict(w_down=[t(0, D)] * T), ValueError, "d_in, r and d_out must be at least 1, got 8, 0 and 8"),
    "fewer": (dict(b_up=[t(D)]), ValueError, "b_up must have one entry per task = 2, got 1"),
    "shape": (
        dict(w_up=[t(D, R), t(D, R + 1)]),
        ValueError,
        r"w_up\[1\] must be \[d_out, r\] = \[8, 4\], got \[8, 5\]",
    ),
    "dtype": (dict(b_down=[t(R), t(R).half()]), TypeError, r"b_down\[1\] must have w_down\[0\]'s dtype"),
    "float64": (dict(w_down=[t(R, D).double()] * T), TypeError, r"w_down\[0\] is torch.float64 beside x"),
    "activation": (dict(activation="softmax"), ValueError, "activation must be one of .* got 'softmax'"),
    "residual": (dict(residual=t(B, D)), ValueError, r"residual must be \[..., d_out\] = \[3, 5, 8\], got \[3, 8\]"),
    "scale": (dict(scale=t(1)), TypeError, "scale must be a float, got Tensor"),
    "task-list": (dict(task=[0, 1, 0]), TypeError, "task must be a tensor, got list"),
    "task-dtype": (dict(task=t(B, dtype=torch.int32)), TypeError, "task must be int64, got torch.int32"),
    "task-shape": (dict(task=t(5, dtype=torch.int64)), ValueError, r"task must have .* x being \[3, 5, 8\], got \[5\]"),
    "task-rank": (dict(task=t(B, 5, D, dtype=torch.int64)), ValueError, "task must have the shape of x's first"),
    "task-device": (dict(task=t(B, dtype=torch.int64, device="meta")), ValueError, "task must be on x's device cpu"),
    "task-high": (dict(task=torch.tensor([0, 2, 9])), ValueError, r"task must lie in \[0, 2\), got 2, 9"),
    "task-negative": (dict(task=torch.tensor([0, -1, 0])), ValueError, r"task must lie in \[0, 2\), got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    check_refused(adapter_bank, good(**changed), error, message)


def batch(impl, tasks=3, tokens=40, samples=7, requires_grad=True):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(device(impl)).requires_grad_(requires_grad)

    lists = [[tensor(*shape) for _ in range(tasks)] for shape in ((R, D), (R,), (D, R), (D,))]
    return tensor(samples, tokens, D), torch.randint(tasks, (samples,), generator=generator).to(device(impl)), lists


@pytest.mark.parametrize("impl", KERNELS)
def test_only_what_trains_gets_a_gradient(impl):
    """Whole tasks and single parameters are frozen; what is left has the gradient it has when all trains."""
    x, _, lists = batch(impl)
    task = torch.tensor([2, 0, 1, 1, 0, 2, 2], device=device(impl))
    every = torch.autograd.grad(adapter_bank(x, task, *lists, impl=impl).sum(), [p for each in lists for p in each])
    for each in lists:
        each[1].requires_grad_(False)
    lists[2][0].requires_grad_(False)
    adapter_bank(x, task, *lists, residual=x, impl=impl).sum().backward()
    for p, grad in zip([p for each in lists for p in each], every):
        assert (p.grad is None) == (not p.requires_grad)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("impl", KERNELS)
def test_sorted_scattered_and_single_samples_agree_with_one_adapter(impl):
    x, task, lists = batch(impl, samples=23, tokens=9, requires_grad=False)
    with torch.no_grad():
        for order in (task, task.sort().values, torch.ones_like(task)):
            y = adapter_bank(x, order, *lists, impl=impl)
            for i, of in enumerate(order.tolist()):
                alone = bottleneck_adapter(x[i], *(each[of] for each in lists), impl=impl)
                torch.testing.assert_close(y[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_share_tasks(threads):
    with setting(threads=threads):
        for tokens in ((200,), (3,)):
            call = CASE.inputs(dict(n=29, d=128, r=40, tasks=4, tokens=tokens))
            assert check(CASE, call, impl="cpp") == []


@pytest.mark.skipif("cpp" not in KERNELS, reason="the check of the C++ kernels")
def test_a_compiled_graph_refuses_a_bad_task_when_it_runs():
    x, task, lists = batch("cpp", requires_grad=False)
    torch._dynamo.reset()
    fn = torch.compile(lambda task: adapter_bank(x, task, *lists, impl="cpp"), fullgraph=True, backend="aot_eager")
    fn(task)
    with pytest.raises(ValueError, match=r"adapter_bank: task must lie in \[0, 3\), got 3"):
        fn(torch.full_like(task, 3))
