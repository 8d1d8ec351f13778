"""`petl_kernels.nn.AdapterBank`: a mixed batch is the loop over its tasks, and tasks never touch one another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from table import impls

from petl_kernels.nn import AdapterBank, BottleneckAdapter
from petl_kernels.testing import CASES

D, R, NAMES = 24, 6, ("a", "b", "c", "d")
IMPLS = impls(next(case for case in CASES if case.name == "adapter_bank"))
MIXED = ["c", "a", "a", "d", "c", "a"]  # and none of "b"


def bank(seed=0, tasks=NAMES, dtype=None, **options):
    torch.manual_seed(seed)
    return AdapterBank(D, R, tasks, **{"init": "bert", "dtype": dtype, **options})


def x(batch=6, *, seed=1, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, D, generator=generator).to(dtype or torch.float32).requires_grad_()


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    """The tasks of which any bit is another than before."""
    now = dict(module.named_parameters())
    return {name.split(".")[1] for name, value in before.items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_a_mixed_batch_is_the_loop_over_tasks(impl, form):
    mixed = bank(form=form, scale=2.0, activation="silu", impl=impl, dtype=torch.float64)
    loop = copy.deepcopy(mixed)
    value, other, residual = x(dtype=torch.float64), x(dtype=torch.float64), x(seed=2, dtype=torch.float64)
    given = (residual,) if form == "parallel" else ()
    y = mixed(value, MIXED, *given)
    g = torch.randn_like(y)
    y.backward(g)
    for name in set(MIXED):
        rows = [i for i, of in enumerate(MIXED) if of == name]
        alone = loop.adapters[name](other[rows], *(r[rows] for r in given))
        torch.testing.assert_close(y[rows], alone)
        alone.backward(g[rows])
    torch.testing.assert_close(value.grad, other.grad)
    for (name, ours), theirs in zip(mixed.named_parameters(), loop.parameters()):
        assert (ours.grad is None) == (theirs.grad is None) == (".b." in name)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_form_of_the_task():
    module = bank(dtype=torch.float64)
    indices = [NAMES.index(name) for name in MIXED]
    wanted = module(x(dtype=torch.float64), MIXED)
    for task in (indices, tuple(MIXED), torch.tensor(indices), module.index(MIXED)):
        assert torch.equal(module(x(dtype=torch.float64), task), wanted)
    per_token = torch.tensor(indices)[:, None].expand(-1, 5)
    torch.testing.assert_close(module(x(dtype=torch.float64), per_token), wanted)
    one = module(x(dtype=torch.float64), "b")
    torch.testing.assert_close(one, module.adapters["b"](x(dtype=torch.float64)))


def test_a_task_tensor_that_is_written_to_is_read_again():
    module, task = bank(), torch.tensor([0, 1])
    module(x(2), task).sum().backward()
    task[1] = 3
    torch.testing.assert_close(module(x(2), task)[1], module.adapters["d"](x(2)[1]))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_absent_frozen_and_added_tasks_stay_bit_identical(optimizer):
    module = bank()
    module.adapters["d"].requires_grad_(False)
    options = dict(lr=0.01, weight_decay=0.1) | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    steps = optimizer([p for p in module.parameters() if p.requires_grad], **options)

    def train(names):
        before = parameters(module)
        for seed in range(3):
            steps.zero_grad()
            module(x(len(names), seed=seed), names).square().mean().backward()
            steps.step()
        return changed(module, before)

    assert train(["a", "b", "d"]) == {"a", "b"}  # with momentum from here on
    assert train(["a"]) == {"a"}
    before = parameters(module)
    steps.add_param_group({"params": list(module.add_task("e").parameters()), **options})
    assert changed(module, before) == set() and module.tasks == (*NAMES, "e")
    assert train(["e", "a", "e"]) == {"a", "e"}
    assert train(["c", "c"]) == {"c"}


def test_an_empty_batch_gives_no_gradient():
    module = bank()
    value = x(0)
    y = module(value, [])
    y.sum().backward()
    assert y.shape == (0, 5, D) and value.grad.shape == value.shape
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    module, task = bank(), torch.tensor([2, 0, 0])
    torch._dynamo.reset()
    fn = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for given in (task, ["c", "a", "a"]):
        y = fn(x(3), given)
        torch.testing.assert_close(y, module(x(3), task))
        y.square().sum().backward()
    assert module.adapters["b"].w_up.grad.count_nonzero() == 0  # a compiler does not see who is absent
    assert module.adapters["a"].w_up.grad.count_nonzero() > 0
    module.drop_absent_grads(task)
    assert [module.adapters[name].b_up.grad is None for name in NAMES] == [False, True, False, True]


def test_adapters_go_in_and_come_out():
    module = bank(activation="relu", scale=0.5)
    adapter = BottleneckAdapter(D, R, activation="relu", scale=0.5, init="bert")
    expected = adapter(x())
    assert module.add_task("e", adapter) is adapter
    torch.testing.assert_close(module(x(), "e"), expected)
    assert module.remove_task("a") and module.tasks == ("b", "c", "d", "e")
    taken = module.remove_task("e")
    assert torch.equal(taken(x()), expected) and "adapters.e.w_up" not in module.state_dict()


def test_copies():
    module = bank(bias=False)
    expected = module(x(), MIXED)
    fresh = bank(seed=5, bias=False)
    assert not torch.equal(fresh(x(), MIXED), expected)
    fresh.load_state_dict(module.state_dict())
    for copied in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x(), MIXED), expected) and copied.tasks == NAMES
    assert set(module.state_dict()) == {f"adapters.{name}.{w}" for name in NAMES for w in ("w_down", "w_up")}
    half = bank(dtype=torch.bfloat16)
    assert half.add_task("e").w_up.dtype == torch.bfloat16 and "bottleneck=6" in repr(half)


BAD = {
    "index": (lambda m: m(x(2), [0, 4]), r"task must lie in \[0, 4\), got 4"),
    "negative": (lambda m: m(x(2), torch.tensor([-1, 0])), r"task must lie in \[0, 4\), got -1"),
    "name": (lambda m: m(x(2), ["a", "z"]), "task must be one of .* got 'z'"),
    "length": (lambda m: m(x(2), ["a"]), r"task must have the shape of x's first dimensions"),
    "residual": (lambda m: m(x(1), "a", x(1)), "residual must be None in the sequential form"),
    "no-tasks": (lambda m: bank(tasks=())(x(1), []), "there is no task yet"),
    "taken": (lambda m: m.add_task("a"), "name must be a new one .* got 'a'"),
    "attribute": (lambda m: m.add_task("train"), "no attribute of nn.ModuleDict, got 'train'"),
    "dots": (lambda m: m.add_task("a.b"), "without dots, got 'a.b'"),
    "shape": (lambda m: m.add_task("e", BottleneckAdapter(D, R + 1)), "bank's bottleneck = 6, got 7"),
    "scale": (lambda m: m.add_task("e", BottleneckAdapter(D, R, scale="learned")), "bank's scale = 1.0, got Param"),
    "bias": (lambda m: m.add_task("e", BottleneckAdapter(D, R, bias=False)), "bank's bias = True, got False"),
    "dropout": (lambda m: m.add_task("e", BottleneckAdapter(D, R, dropout=0.5)), "no dropout, got 0.5"),
    "module": (lambda m: m.add_task("e", torch.nn.Linear(D, D)), "must be a BottleneckAdapter, got Linear"),
    "remove": (lambda m: m.remove_task("z"), "task must be one of .* got 'z'"),
    "string": (lambda m: bank(tasks="abc"), "tasks must be a list of names, got 'abc'"),
    "learned": (lambda m: bank(scale="learned"), "scale must be a float, got 'learned'"),
    "form": (lambda m: bank(form="both"), "form must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(bank())
