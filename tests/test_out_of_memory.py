"""Memory that runs out leaves parameters, optimizer state and a model's structure as they were, and later calls work.

Here every operator in turn fails as an allocation does. In a process of its own (`out_of_memory_worker.py`) the address
space is limited, so that real allocations fail, those of the C++ kernels too.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import CONFIGURATIONS, OPTIMIZERS, entries
from small_models import batches, loss, make
from table import case_impl, inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels import attach, detach, fuse
from petl_kernels.integrations import patterns
from petl_kernels.testing import run
from petl_kernels.two_stage import Selection, tune_channels


class Failing(TorchDispatchMode):
    """The operator after so many others runs out of memory."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self.left = others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func.namespace != "profiler"  # whose operators mark where a step ends
        if self.left < 0:
            raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def failures(attempt: Callable[[], Any]) -> Iterator[int]:
    """Let `attempt` fail at its first operator, at its second and so on, and succeed at last."""
    for others in range(10_000):
        try:
            with Failing(others):
                attempt()
        except torch.OutOfMemoryError:
            yield others
        else:
            assert others > 0  # or nothing failed
            return


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that must not change, with copies of all bits."""
    modules = [(name, id(m), type(m), len(m._forward_hooks), "forward" in vars(m)) for name, m in model.named_modules()]
    modules += [sorted(m.__dict__) for m in model.modules()]
    return [modules, *((n, id(p), p.requires_grad, copied(p), copied(p.grad)) for n, p in model.named_parameters())]


def copied(t: Tensor | None) -> Any:
    return None if t is None else t.detach().flatten().tolist()


@pytest.mark.parametrize("case, impl", case_impl(lambda case: ["cpp"]))
def test_an_op_leaves_its_arguments_as_they_were(case, impl):
    call = inputs(case, impl)
    expected = run(case.fn, call, impl=impl)  # channel_linear has put the trained channels in their place
    before = {name: value.detach().clone() for name, value in call.items() if isinstance(value, Tensor)}
    found = []
    for _ in failures(lambda: found.append(run(case.fn, call, impl=impl))):
        assert all(torch.equal(call[name], value) for name, value in before.items())
    for (name, got), (_, wanted) in zip(found[0].items(), expected.items(), strict=True):
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("configuration", ["adamw", "sgd-nesterov"])
@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_a_step_is_done_or_not_done(impl, configuration):
    kind, options = CONFIGURATIONS[configuration]

    def fresh() -> tuple[list[Any], torch.optim.Optimizer]:
        made, generator = list(entries(impl).values()), torch.Generator().manual_seed(0)
        for e in made:
            e.set_grad(generator)
        return made, OPTIMIZERS[kind][0]([e.item for e in made], **options, impl=impl)

    done, optimizer = fresh()
    optimizer.step()
    for others in range(10_000):
        made, optimizer = fresh()
        try:
            with Failing(others):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            pass
        for e, after in zip(made, done):
            state = optimizer.state.get(e.param)
            assert not state or impl == "reference"  # which takes one tensor after the other
            stepped = bool(state) and state["step"].item() == 1
            assert torch.equal(e.param, after.param if stepped else e.start)
        if impl == "cpp":  # and the next one is the first
            optimizer.step()
            assert all(torch.equal(e.param, after.param) for e, after in zip(made, done))
    assert others > 10 and all(torch.equal(e.param, after.param) for e, after in zip(made, done))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for index, p in enumerate(model.parameters()):
        p.requires_grad_(index % 2 == 0)
        p.grad = torch.ones_like(p) if index % 3 == 0 else None
    return model


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "parallel", "prefix", "ia3", "mam"])
def test_attach_leaves_the_model_as_it_was(method):
    model = encoder()
    before = snapshot(model)
    for _ in failures(lambda: attach(model, method)):
        assert snapshot(model) == before
    model(torch.randn(2, 5, 16)).sum().backward()
    detach(model)


def test_tune_channels_leaves_the_model_as_it_was():
    model = make()
    loss(model, batches()[0]).backward()
    names = ["blocks.0.qkv", "blocks.0.up", "blocks.1.down"]
    widths = {name: model.get_submodule(name).out_features for name in names}
    chosen = Selection({name: torch.arange(0, width, 3) for name, width in widths.items()}, widths)
    before = snapshot(model)
    for _ in failures(lambda: tune_channels(model, chosen, keep_trainable="head.*")):
        assert snapshot(model) == before
    assert snapshot(model) != before
    loss(model, batches()[0]).backward()


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


def test_fuse_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(Bottleneck(), Bottleneck(), Bottleneck())
    fuse(model[0])
    before, made, real = snapshot(model), [], patterns.fused_class

    def fail_at_the_third(*of: Any) -> type:
        made.append(of)
        if len(made) == 3:  # the first of which is fused already
            raise MemoryError
        return real(*of)

    monkeypatch.setattr(patterns, "fused_class", fail_at_the_third)
    with pytest.raises(MemoryError):
        fuse(model)
    assert snapshot(model) == before
    assert len(fuse(model).fused) == 3


def test_a_model_whose_forward_failed_can_be_copied():
    """What is on its way from one module to another when it fails stays there, and is not copied along."""
    model = encoder()
    attach(model, "parallel")
    x = torch.randn(2, 5, 16, requires_grad=True) * 2  # what the layers below would give
    expected = model(x)
    for _ in failures(lambda: model(x)):
        if any(name.endswith("petl_input") and m.value is not None for name, m in model.named_modules()):
            break
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(again(x), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_kernels_raise_where_no_memory_is_left():
    """Not one ends the process: `std::bad_alloc` in a thread of OpenMP would."""
    worker = Path(__file__).with_name("out_of_memory_worker.py")
    # Every large block an allocation of its own, given back when it is freed.
    alone = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", OMP_WAIT_POLICY="passive")
    process = subprocess.run([sys.executable, worker], env={**os.environ, **alone}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    counts = {name: (int(failed), int(inside)) for name, failed, inside in map(str.split, process.stdout.splitlines())}
    assert all(counts[name][0] > 3 for name in ("bottleneck_adapter", "adapter_bank", "layer_norm", "optimizer"))
    assert all(counts[name][1] > 0 for name in ("bottleneck_adapter", "adapter_bank", "adapter_norm", "norm_adapter"))
