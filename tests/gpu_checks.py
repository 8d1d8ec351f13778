"""What has to hold on a GPU, as functions of a case, an implementation and a device.

`test_gpu.py` calls them on a GPU, and on the CPU with what runs there, so that they are known to work and to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from petl_kernels.testing import Case, Inputs, Outcome, arguments, in_float64, judge, run

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


def call_of(case: Case, device: str, seed: int = 0, **sample: Any) -> Inputs:
    """The typical call in bfloat16, without the modifications that the CUDA kernels refuse."""
    plain = {"gate": None, "dropout": 0.0}
    return case.inputs({**case.typical, **plain, **sample}, torch.bfloat16, device=device, seed=seed)


def distinct(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among the arguments, each under its first name."""
    named = [(name, t) for name, t in arguments(inputs).items() if isinstance(t, Tensor)]
    return dict({id(t): (name, t) for name, t in reversed(named)}.values())


def with_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The call with every tensor changed; what was one tensor stays one, and what trained trains."""
    made = {id(t): change(t.detach()).requires_grad_(t.requires_grad) for t in distinct(inputs).values()}
    return {name: made.get(id(value), value) for name, value in inputs.items()}


def equal(a: Outcome, b: Outcome) -> bool:
    """Whether output and gradients are the same, bit for bit."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


def replay_equals_eager(case: Case, impl: str, device: str, capture: Capture) -> None:
    """A captured forward and backward, replayed on new values in the same memory, gives what eager gives for them."""
    held = call_of(case, device, n=130)
    leaves = [t for t in distinct(held).values() if t.requires_grad]
    with torch.no_grad():
        gradient = torch.ones_like(case.fn(**arguments(held), impl=impl))

    def step() -> list[Tensor]:
        output = case.fn(**arguments(held), impl=impl)
        return [output.detach(), *(torch.autograd.grad(output, leaves, gradient) if leaves else ())]

    results: list[Tensor] = []

    def captured() -> None:
        results[:] = step()

    step()  # allocates, and reads on the host what is read once
    replay = capture(captured)
    for seed in (1, 2):
        fresh = distinct(call_of(case, device, seed, n=130))
        with torch.no_grad():
            for name, tensor in distinct(held).items():
                if tensor.is_floating_point():
                    tensor.copy_(fresh[name])
            gradient.copy_(torch.randn_like(gradient))
        replay()
        now = [t.clone() for t in results]
        expected = step()
        assert all(torch.equal(a, b) for a, b in zip(now, expected, strict=True)), seed
        assert all(t.abs().max() > 0 for t in expected)


def ten_runs_are_bit_identical(case: Case, impl: str, device: str, **sample: Any) -> None:
    """At a size at which the sums over rows are shared out among programs."""
    given = case.inputs({**case.bench[0], **sample}, torch.bfloat16, device=device)
    first = run(case.fn, given, impl=impl)
    assert all(equal(first, run(case.fn, given, impl=impl)) for _ in range(9))
    assert all(value.abs().max() > 0 for _, value in first.items())


def far_rows(case: Case, impl: str, device: str, elements: int) -> None:
    """Rows behind so many elements (2^31) of x: zeros in front of a small call change nothing of it.

    The rows in front have no gradient either, so that the sums over rows are those of the small call, against which
    everything is judged: outputs and gradients of its rows, and the gradients of what has no rows.
    """
    n = 70
    small = call_of(case, device, n=n, samples=())  # x is [n, d] in every case
    total = -(-elements // next(iter(distinct(small).values())).shape[-1]) + n

    def tail(t: Tensor) -> Tensor:
        return t[-n:] if t.shape[:1] == (total,) else t

    def padded(t: Tensor) -> Tensor:
        if t.shape[:1] != (n,):
            return t.clone()
        far = t.new_zeros((total, *t.shape[1:]))
        tail(far).copy_(t)
        return far

    large = with_tensors(small, padded)
    names = [name for name, t in distinct(large).items() if t.requires_grad]

    def outcome(inputs: Inputs, impl: str) -> Outcome:
        output = case.fn(**arguments(inputs), impl=impl)
        gradient = torch.zeros_like(output)
        noise = torch.randn(tail(output).shape, generator=torch.Generator().manual_seed(7))
        tail(gradient).copy_(noise.bfloat16())
        leaves = [inputs[name] for name in names]
        grads = torch.autograd.grad(output, leaves, gradient) if leaves else ()
        return Outcome(tail(output.detach()), dict(zip(names, map(tail, grads))))

    eager, exact = (outcome(inputs, "reference") for inputs in (small, in_float64(small)))
    failures = judge(outcome(large, impl), eager, exact)
    assert failures == [], failures


def a_stream_of_its_own_gives_the_same(case: Case, impl: str) -> None:
    """Behind operands that are late on that stream: whoever launches on another one reads what is not there yet."""
    given = call_of(case, "cuda", n=1000)
    expected = run(case.fn, given, impl=impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = with_tensors(given, lambda t: t.clone() if t.dtype == torch.int64 else torch.zeros_like(t))
        run(case.fn, late, impl=impl)  # compiles, and reads on the host what is read once
        torch.cuda._sleep(100_000_000)  # some 50 ms
        with torch.no_grad():
            for name, tensor in distinct(late).items():
                tensor.copy_(given[name])
        got = run(case.fn, late, impl=impl)
    stream.synchronize()
    assert equal(got, expected)


def another_device_gives_the_same(case: Case, impl: str) -> None:
    """On the second GPU while the first is current; a launch on the wrong one fails or computes nothing."""
    first, second = (run(case.fn, call_of(case, f"cuda:{i}", n=1000), impl=impl) for i in (0, 1))
    assert all(
        b.device.index == 1 and torch.equal(a, b.to(a.device)) for (_, a), (_, b) in zip(first.items(), second.items())
    )
