"""Every op, from the one table: each implementation against float64, and as a citizen of PyTorch."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from fuzzing import samples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from table import (
    DTYPES,
    LOW,
    Recorder,
    case_impl,
    device,
    frozen,
    impls,
    inputs,
    interpreted,
    kernels,
    long_if,
    replaced,
    short,
    table,
    tensors,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from petl_kernels.testing import CASES, Case, Inputs, arguments, check, check_draws, run

EVERY_IMPL = pytest.mark.parametrize("case, impl", case_impl())
EVERY_KERNEL = pytest.mark.parametrize("case, impl", case_impl(kernels))
# Of the ops that have gradients:
EVERY_GRADIENT = pytest.mark.parametrize("case, impl", case_impl(kernels, differentiable=True))
EVERY_DIFFERENTIABLE = pytest.mark.parametrize("case, impl", case_impl(differentiable=True))
EVERY_CASE = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=lambda case: case.name)


def compiled(fn: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, **{"backend": "aot_eager", **options})


def first(call: Inputs) -> str:
    """The argument that is transformed, checkpointed or exported: the first tensor."""
    return next(name for name, value in call.items() if isinstance(value, torch.Tensor))


def options(case: Case) -> tuple[Any, ...]:
    """What is changed of the typical call, one after the other."""
    return ({}, *case.variants)


def of_first(case: Case, call: Inputs, **options: Any) -> Any:
    """The op as a function of its first tensor."""
    return lambda value: case.fn(**replaced(call, first(call), value), **options)


@pytest.mark.parametrize("case, sample, impl, dtype", table())
def test_eager(case, sample, impl, dtype):
    assert check_draws(case, partial(case.inputs, sample, dtype, None, device(impl)), impl=impl) == []


# One graph per call, whichever kernels and dtype are in it: test_autocast compiles the typical ones with all of them.
@pytest.mark.parametrize(
    "case, sample, impl, dtype",
    long_if(table(compiled=True), lambda case, sample, impl, dtype: interpreted(impl) or dtype != torch.float32),
)
def test_compiled(case, sample, impl, dtype):
    draw = partial(case.inputs, sample, dtype, None, device(impl))
    assert check_draws(case, draw, compiled(case.fn, dynamic=False), impl=impl) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("case, impl", long_if(case_impl(), lambda case, impl: impl == "reference"))
def test_inductor(case, impl):
    fn = compiled(case.fn, backend="inductor")
    assert check(case, inputs(case, impl), fn, impl=impl) == []


@pytest.mark.parametrize("dtype", LOW, ids=short)
@EVERY_IMPL
def test_float32_parameters(case, impl, dtype):
    for option in options(case):
        assert check(case, inputs(case, impl, dtype, parameter_dtype=torch.float32, **option), impl=impl) == []


@EVERY_IMPL
def test_autocast(case, impl):
    for option in options(case):
        for dtype in (torch.float32, torch.bfloat16):
            call = inputs(case, impl, dtype, **option)
            with torch.autocast(device(impl), dtype=torch.bfloat16):
                assert check(case, call, impl=impl) == []
                assert check(case, call, compiled(case.fn), impl=impl) == []


@st.composite
def random_calls(draw: Any) -> tuple[Case, dict[str, Any], torch.dtype, int]:
    """A sample of any op with its sizes redrawn, for all implementations."""
    case = draw(st.sampled_from(CASES))
    sample = draw(samples(case))
    dtype = draw(st.sampled_from((torch.float32, *LOW)))
    return case, sample, dtype, draw(st.integers(0, 2**16))


# Not shrunk: a call that fails is judged by 32 draws, each time, under Triton's interpreter for minutes.
@settings(derandomize=True, deadline=None, max_examples=25, database=None, phases=[Phase.generate])
@given(random_calls())
def test_random_calls(drawn):
    case, sample, dtype, seed = drawn
    for impl in impls(case):
        draw = partial(case.inputs, sample, dtype, None, device(impl))
        found = check_draws(case, draw, impl=impl, first=seed)
        failures = [f for f in found if "vacuous" not in f]  # no matter of the kernel's
        assert failures == [], (impl, sample)


@pytest.mark.parametrize(
    "case, impl, entry",
    [
        pytest.param(*p.values, entry, id=f"{p.id}-{entry}", marks=p.marks)
        for p in case_impl(kernels)
        for entry in p.values[0].op.directions
    ],
)
@pytest.mark.parametrize("through", ["eager", "compiled"])
def test_a_kernel_that_returns_zeros_fails(case, impl, entry, through, monkeypatch):
    direction = case.op.directions[entry]
    real = getattr(case.op.module(impl), entry)
    call = inputs(case, impl)
    fn = case.fn if through == "eager" else compiled(case.fn)
    returns = direction.overload._schema.returns
    for index, returned in enumerate(returns):
        empty = []

        def zeros(*args: Any, index: int = index, empty: list[bool] = empty) -> Any:
            results = real(*args)
            empty.append(len(returns) > 1 and results[index].numel() == 0)
            if len(returns) == 1:
                return torch.zeros_like(results)
            return tuple(torch.zeros_like(t) if i == index else t for i, t in enumerate(results))

        monkeypatch.setitem(direction._callables, impl, zeros)
        failures = check(case, call, fn, impl=impl)
        if all(empty):
            continue  # this implementation does not make it
        # What a forward returns besides its result is for the backward, and any gradient may show that it is wrong.
        wrong = f"{returned.name}:" if entry == "backward" else "" if index else "output:"
        assert any(f.startswith(wrong) for f in failures), (returned.name, failures)


@EVERY_KERNEL
def test_nan_and_infinity_pass_as_in_eager(case, impl):
    for sample in case.samples:
        call = case.inputs(sample, device=device(impl))
        name = first(call)
        if call[name].numel() < 2:
            continue
        value = call[name].detach().clone()
        value[(0,) * value.dim()] = torch.nan
        value[(-1,) * value.dim()] = torch.inf
        call = replaced(call, name, value)
        ours, eager = (case.fn(**call, impl=which) for which in (impl, "reference"))
        finite, infinite = eager.isfinite(), eager.isinf()
        assert torch.equal(ours.isfinite(), finite), sample
        # Not NaN for NaN: of gelu(inf) eager's vector code makes NaN and its scalar code inf.
        assert torch.equal(ours[infinite], eager[infinite]), sample
        torch.testing.assert_close(ours[finite], eager[finite], rtol=1e-4, atol=1e-4)


@EVERY_GRADIENT
def test_rows_of_the_gradient_may_lie_apart(case, impl):
    call = inputs(case, impl)
    y = case.fn(**arguments(call), impl=impl)
    g = torch.randn(y.shape, dtype=y.dtype).to(y.device)
    apart = torch.cat([g, torch.full_like(g, torch.nan)], -1)[..., : g.shape[-1]]
    dense, strided = (torch.autograd.grad(y, [*tensors(call).values()], v, retain_graph=True) for v in (g, apart))
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


@pytest.mark.parametrize("case, impl", long_if(case_impl(), lambda case, impl: interpreted(impl)))
def test_bit_identical_over_ten_runs(case, impl):
    call = inputs(case, impl, n=129)
    runs = [run(case.fn, call, impl=impl).items() for _ in range(10)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(runs[0], again))


@pytest.mark.parametrize(
    "case, impl", [p for p in case_impl(differentiable=True) if torch.float64 in DTYPES[p.values[1]]]
)
def test_gradcheck(case, impl):
    for option in options(case):
        call = inputs(case, impl, torch.float64, **{**case.tiny, **option})
        names, leaves = zip(*tensors(call).items())

        def fn(*values: Any, call: Inputs = call, names: Any = names) -> torch.Tensor:
            for name, value in zip(names, values):
                call = replaced(call, name, value)
            return case.fn(**call, impl=impl)

        assert gradcheck(fn, leaves)


@EVERY_CASE
def test_reference_differentiates_twice(case):
    call = inputs(case, "reference", torch.float64, **case.tiny)
    assert gradgradcheck(of_first(case, arguments(call), impl="reference"), call[first(call)])


@EVERY_GRADIENT
def test_double_backward_is_refused_in_our_words(case, impl):
    call = inputs(case, impl)
    leaves = list(tensors(call).values())
    output = case.fn(**arguments(call), impl=impl)
    once = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{case.name}: double backward .* impl='reference'"):
        torch.autograd.grad(sum(g.sum() for g in once), leaves)


@EVERY_GRADIENT
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_is_refused_in_our_words_and_goes_to_the_reference(case, impl, grad):
    call = inputs(case, impl)
    value = call[first(call)].detach()
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match=rf"{case.name}: impl='{impl}' .* forward-mode AD"):
            of_first(case, call, impl=impl)(dual)
        auto, reference = (
            forward_ad.unpack_dual(of_first(case, call, impl=which)(dual)).tangent for which in (None, "reference")
        )
        of_first(case, call, impl=impl)(value)  # without a tangent nothing is refused
    assert torch.equal(auto, reference)


@EVERY_GRADIENT
def test_only_the_needed_gradients_are_computed(case, impl):
    backward = case.op.directions["backward"].overload
    returned = [r.name.removeprefix("d") for r in backward._schema.returns]
    for untrained in returned:
        call = inputs(case, impl, frozen=(untrained,))
        with Recorder() as recorder:
            run(case.fn, call, impl=impl)
        ((_, _, grads),) = [made for made in recorder.calls if made[0] is backward]
        sizes = {name: grad.numel() for name, grad in zip(returned, grads)}
        assert sizes == {name: 0 if name == untrained else call[name].numel() for name in returned}


@EVERY_KERNEL
def test_wrapper_tensors_go_to_the_reference(case, impl):
    """A tensor that wraps others (as DTensor does) has no memory of its own for a kernel to read."""
    call = frozen(inputs(case, impl))
    wrapped = replaced(call, first(call), TwoTensor(call[first(call)], call[first(call)]))
    with pytest.raises(RuntimeError, match=rf"{case.name}: impl='{impl}' .* got a TwoTensor"):
        case.fn(**wrapped, impl=impl)
    torch.testing.assert_close(case.fn(**wrapped).a, case.fn(**call, impl="reference"))


@EVERY_DIFFERENTIABLE
def test_nothing_is_saved_without_grad(case, impl):
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            output = case.fn(**arguments(inputs(case, impl)), impl=impl)
        untrained = case.fn(**frozen(inputs(case, impl)), impl=impl)
    assert not saved and not output.requires_grad and not untrained.requires_grad


@EVERY_DIFFERENTIABLE
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(case, impl, reentrant):
    def checkpointed(**given: Any) -> torch.Tensor:
        # What trains goes in as arguments, of which alone a reentrant checkpoint knows; the rest a layer holds itself.
        trained = tensors(given)

        def fn(*values: torch.Tensor) -> torch.Tensor:
            now = {id(old): value for old, value in zip(trained.values(), values)}
            return case.fn(**{name: now.get(id(value), value) for name, value in given.items()}, impl=impl)

        return checkpoint(fn, *trained.values(), use_reentrant=reentrant)

    if reentrant:  # and torch.autograd.grad does not work through it
        call = inputs(case, impl)
        leaves = list(tensors(call).values())
        checkpointed(**arguments(call)).sum().backward()
        expected = torch.autograd.grad(case.fn(**arguments(call), impl=impl).sum(), leaves)
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected))
    else:
        assert check(case, inputs(case, impl), checkpointed) == []


@EVERY_CASE
def test_vmap_and_grad_run_on_the_reference(case):
    call = arguments(case.inputs(case.host))
    value = call[first(call)]
    fn = of_first(case, call)
    mapped, total = torch.vmap(fn), torch.func.grad(lambda v: fn(v).sum())
    torch.testing.assert_close(mapped(value), of_first(case, call, impl="reference")(value))
    torch.testing.assert_close(compiled(mapped)(value), mapped(value))
    torch.testing.assert_close(total(value), torch.autograd.grad(fn(value).sum(), value)[0])


@EVERY_GRADIENT
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_an_explicit_kernel_are_refused(case, impl, transform):
    call = arguments(case.inputs(case.host, device=device(impl)))
    fn = of_first(case, call, impl=impl)
    transformed = torch.vmap(fn) if transform == "vmap" else torch.func.grad(lambda v: fn(v).sum())
    with pytest.raises(RuntimeError, match=rf"{case.name}: impl='{impl}' .* torch\.func transforms"):
        transformed(call[first(call)])


@EVERY_IMPL
def test_one_compilation_serves_every_size(case, impl):
    counter = CompileCounterWithBackend("aot_eager")
    fn = compiled(case.fn, backend=counter, dynamic=True)
    counts = set()
    for n in (7, 9, 13, 34):  # none equal to another size, which would become a guard
        assert check(case, inputs(case, impl, n=n), fn, impl=impl) == []
        counts.add(counter.frame_count)
    assert len(counts) == 1  # 1, or 2 of an op with a float: Dynamo traces it as a variable and starts over without it


@EVERY_IMPL
def test_a_changed_batch_recompiles_once(case, impl):
    counter = CompileCounterWithBackend("aot_eager")
    fn = compiled(case.fn, backend=counter)
    for n in (5, 8, 13, 34):
        assert check(case, inputs(case, impl, n=n), fn, impl=impl) == []
    assert counter.frame_count == 2


class Layer(torch.nn.Module):
    """A call of an op with its first tensor as the input and the others as parameters."""

    def __init__(self, case: Case, call: Inputs, impl: str) -> None:
        super().__init__()
        self.case, self.impl, self.first = case, impl, first(call)
        self.aliases = {name for name, value in call.items() if value is call[self.first]}
        trained = {name: torch.nn.Parameter(t.detach()) for name, t in tensors(call).items() if name != self.first}
        self.trained = torch.nn.ParameterDict(trained)
        self.options = {name: v for name, v in call.items() if name not in self.aliases and name not in trained}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.case.fn(**dict.fromkeys(self.aliases, value), **self.trained, **self.options, impl=self.impl)


@EVERY_IMPL
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_export(case, impl, dynamic, grad):
    call = arguments(case.inputs(case.host, device=device(impl)))
    layer = Layer(case, call, impl)
    value = call[first(call)].detach()
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (value,), dynamic_shapes=shapes)
    targets = {node.target for node in program.graph.nodes}
    if "forward" in case.op.directions:
        assert (case.op.directions["forward"].overload in targets) == (impl != "reference")
    for rows in (value, torch.cat([value] * 3)) if dynamic else (value,):
        torch.testing.assert_close(program.module()(rows), layer(rows))


@EVERY_KERNEL
def test_opcheck(case, impl):
    recorder = Recorder()
    with recorder:
        run(case.fn, inputs(case, impl), impl=impl)
        for option in case.variants:
            run(case.fn, inputs(case, impl, torch.bfloat16, parameter_dtype=torch.float32, **option), impl=impl)
        with torch.no_grad():
            case.fn(**frozen(inputs(case, impl)), impl=impl)
    assert {made[0] for made in recorder.calls} == {d.overload for d in case.op.directions.values()}
    for overload, args, _ in recorder.calls:
        torch.library.opcheck(overload, tree_map_only(torch.Tensor, torch.Tensor.detach, args))
