"""Which implementation runs: context manager > argument > environment > auto, and never a silent fallback."""

from __future__ import annotations

import re
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from table import case_impl, inputs
from torch._dynamo.testing import CompileCounterWithBackend

from petl_kernels import explain, use_impl
from petl_kernels.ops._op import Op
from petl_kernels.testing import CASES, arguments

CASE = CASES[0]
OP = CASE.op


@pytest.fixture
def fakes(monkeypatch):
    """The op with recording stand-ins, so that a choice shows without anything having been built."""
    package = "petl_kernels.ops." + OP.name
    state = SimpleNamespace(ran=[], refusals={}, op=OP)
    names = [name for name in OP.impls if name != "reference"]
    for name in names:

        def forward(x, w_down, *rest, name=name):
            state.ran.append(name)
            return x + 1, x.new_empty((0,))

        def unsupported(*call, name=name):
            return state.refusals.get(name)

        module = SimpleNamespace(forward=forward, unsupported=unsupported)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
        monkeypatch.setattr(f"{package}.{name}", module, raising=False)
        monkeypatch.setitem(OP.directions["forward"]._callables, name, forward)
    monkeypatch.setattr("petl_kernels.ops._op._import_failures", {f"{package}.{n}": None for n in names})
    monkeypatch.delenv("PETL_KERNELS_IMPL", raising=False)
    return state


def ran(state, impl=None, fn=CASE.fn):
    """The implementation that ran a call."""
    state.ran.clear()
    with torch.no_grad():
        fn(**arguments(CASE.inputs(CASE.host)), impl=impl)
    return state.ran[0] if state.ran else "reference"


def test_precedence(fakes, monkeypatch):
    assert ran(fakes) == "cpp"
    monkeypatch.setenv("PETL_KERNELS_IMPL", "reference")
    assert ran(fakes) == "reference"
    assert ran(fakes, "triton") == "triton"
    with use_impl("cpp"):
        assert ran(fakes, "triton") == "cpp"
        with use_impl("reference"):
            assert ran(fakes, "triton") == "reference"
        assert ran(fakes, "triton") == "cpp"
    assert ran(fakes, "triton") == "triton"
    assert ran(fakes, "auto") == "cpp"


def test_an_empty_variable_is_none(fakes, monkeypatch):
    monkeypatch.setenv("PETL_KERNELS_IMPL", "")
    assert ran(fakes) == "cpp"


def test_the_context_ends_with_an_exception(fakes):
    with pytest.raises(KeyError), use_impl("triton"):
        raise KeyError
    assert ran(fakes) == "cpp"


def test_auto_takes_the_reference_where_nothing_else_can(fakes):
    fakes.refusals = {"cpp": "no", "triton": "no"}
    assert ran(fakes) == "reference"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_explicit_request_never_falls_back(fakes, how, monkeypatch):
    fakes.refusals = {"triton": "it is a Tuesday"}
    if how == "environment":
        monkeypatch.setenv("PETL_KERNELS_IMPL", "triton")
    context = use_impl("triton") if how == "context" else nullcontext()
    message = rf"{OP.name}: impl='triton' cannot run this call: it is a Tuesday"
    with context, pytest.raises(RuntimeError, match=message):
        ran(fakes, "triton" if how == "argument" else None)


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_unknown_name_is_refused(how, monkeypatch):
    call = arguments(CASE.inputs(CASE.host))
    message = rf"{OP.name}: impl must be one of \('auto', 'reference', .*\), got 'fast'"
    with pytest.raises(ValueError, match=message):
        if how == "context":
            with use_impl("fast"):
                CASE.fn(**call)
        elif how == "environment":
            monkeypatch.setenv("PETL_KERNELS_IMPL", "fast")
            CASE.fn(**call)
        else:
            CASE.fn(**call, impl="fast")


def test_an_implementation_that_was_not_built_says_so(monkeypatch):
    name = f"petl_kernels.ops.{OP.name}.cpp"
    monkeypatch.setattr("petl_kernels.ops._op._import_failures", {})
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=rf"{OP.name}: impl='cpp' cannot run this call: it cannot be imported here"):
        CASE.fn(**arguments(CASE.inputs(CASE.host)), impl="cpp")
    assert CASE.fn(**arguments(CASE.inputs(CASE.host))).shape


def test_explain(fakes):
    fakes.refusals = {"triton": "it is a Tuesday"}
    call = arguments(CASE.inputs(CASE.host))
    auto = explain(CASE.fn, **call)
    assert (auto.op, auto.chosen, set(auto.others)) == (OP.name, "cpp", set(OP.impls) - {"cpp"})
    assert auto.others["triton"] == "it is a Tuesday"
    assert str(auto).splitlines()[0] == f"{OP.name} runs on 'cpp': known to be the fastest here"
    assert "  not triton: it is a Tuesday" in str(auto).splitlines()
    asked = explain(CASE.fn, **call, impl="reference")
    assert asked.chosen == "reference" and asked.why == "it was asked for"
    assert asked.others["cpp"] == "'reference' was asked for"
    assert not fakes.ran


def test_explain_of_something_else():
    with pytest.raises(TypeError, match=re.escape(f"explain: fn must be one of the ops {sorted(Op.registry)}")):
        explain(torch.add, 1, 2)


def test_explain_raises_what_the_call_would():
    call = arguments(CASE.inputs(CASE.host))
    with pytest.raises(TypeError, match=OP.name):
        explain(CASE.fn, **{**call, "x": 3})


def test_the_context_holds_for_its_thread(fakes):
    seen = []
    with use_impl("triton"):
        thread = threading.Thread(target=lambda: seen.append(ran(fakes)))
        thread.start()
        thread.join()
        assert ran(fakes) == "triton"
    assert seen == ["cpp"]


@pytest.mark.parametrize("case, impl", case_impl())
def test_a_compiled_call_follows_the_context(case, impl):
    """Entering or leaving `use_impl` recompiles once, and a graph names the implementation whose forward it calls."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append([node.args[-1] for node in graph.graph.nodes if node.target in overloads])
        return graph

    overloads = {direction.overload for direction in case.op.directions.values()}
    fn = torch.compile(lambda call: case.fn(**call), backend=backend, fullgraph=True)
    call = arguments(inputs(case, impl, **case.host))
    with torch.no_grad():
        with use_impl("reference"):
            plain = fn(call)
        for _ in range(2):
            with use_impl(impl):
                torch.testing.assert_close(fn(call), plain)
            with use_impl("reference"):
                fn(call)
    named = [impl] if "forward" in case.op.directions else []
    assert graphs == ([[]] if impl == "reference" else [[], named])


def test_a_compiled_call_follows_the_environment(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fn = torch.compile(CASE.fn, backend=counter, fullgraph=True)
    call = arguments(CASE.inputs(CASE.host))
    monkeypatch.setenv("PETL_KERNELS_IMPL", "reference")
    fn(**call)
    monkeypatch.setenv("PETL_KERNELS_IMPL", "fast")
    with pytest.raises(Exception, match="impl must be one of"):
        fn(**call)
