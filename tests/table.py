"""What is demanded of each implementation, and the calls of `CASES` as pytest parameters.

The list is positive: an implementation that was not built fails its tests. `PETL_KERNELS_TEST_IMPLS=reference,cpp`
narrows them to some implementations, for work where the others cannot be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels import explain
from petl_kernels.testing import CASES, Case, Inputs, arguments

LOW = (torch.bfloat16, torch.float16)
DTYPES = {
    "reference": (torch.float32, *LOW, torch.float64),
    "cpp": (torch.float32, *LOW, torch.float64),
    "triton": (torch.float32, *LOW),
    "cuda": (torch.float32, *LOW),
}


def demanded(impl: str) -> bool:
    """All but CUDA's where there is no GPU: what they compute, csrc/tests shows there on an emulated one.

    Of "cuda_sm90", which takes some shapes and dtypes only, test_cuda_sm90.py has calls of its own.
    """
    only = os.environ.get("PETL_KERNELS_TEST_IMPLS")
    return impl in DTYPES and (impl != "cuda" or torch.cuda.is_available()) and (not only or impl in only.split(","))


def impls(case: Case) -> list[str]:
    return [name for name in case.op.impls if demanded(name)]


def kernels(case: Case) -> list[str]:
    return [name for name in impls(case) if name != "reference"]


def device(impl: str) -> str:
    """CPU kernels run on the CPU, everything else on a GPU where there is one (Triton: under its interpreter)."""
    return "cuda" if impl != "cpp" and torch.cuda.is_available() else "cpu"


def marks(impl: str) -> list[pytest.MarkDecorator]:
    """`pytest -m gpu` takes what runs on one."""
    return [pytest.mark.gpu] if device(impl) == "cuda" else []


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def case_impl(of: Any = impls, differentiable: bool = False) -> list[Any]:
    """Parameters (case, impl), of the differentiable ops only if so wanted."""
    return [
        pytest.param(case, impl, id=f"{case.name}-{impl}", marks=marks(impl))
        for case in CASES
        if case.differentiable or not differentiable
        for impl in of(case)
    ]


def interpreted(impl: str) -> bool:
    """Whether its kernels run in Triton's interpreter: one program after the other, in the same order every time."""
    return impl == "triton" and device(impl) == "cpu"


def long_if(parameters: list[Any], condition: Callable[..., bool]) -> list[Any]:
    """The parameters, those of which the condition holds left to `make test-long`."""
    marked = [[*p.marks, pytest.mark.long] if condition(*p.values) else p.marks for p in parameters]
    return [pytest.param(*p.values, id=p.id, marks=marks) for p, marks in zip(parameters, marked)]


# Compiled, a dtype is a matter of tracing: which kernels it reaches, eager calls have shown.
COMPILED = {"reference": (torch.float32,), "triton": (torch.float32,)}


def table(compiled: bool = False) -> list[Any]:
    """Parameters (case, sample, impl, dtype): every dtype in eager, float32 compiled, of cpp bfloat16 too."""
    parameters = []
    for case in CASES:
        for impl in impls(case):
            dtypes = COMPILED.get(impl, (torch.float32, torch.bfloat16)) if compiled else DTYPES[impl]
            for sample, dtype in product(case.samples, dtypes):
                name = f"{case.name}-{sample['id']}-{impl}-{short(dtype)}"
                parameters.append(pytest.param(case, sample, impl, dtype, id=name, marks=marks(impl)))
    return parameters


@contextmanager
def setting(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """With this instruction set of the CPU kernels and this number of threads; None leaves either as it is."""
    before, active = torch.get_num_threads(), None
    torch.set_num_threads(before if threads is None else threads)
    try:
        if isa is not None:
            from petl_kernels import _cpu

            active = _cpu.isa()
            _cpu.set_isa(isa)
        yield
    finally:
        torch.set_num_threads(before)
        if active is not None:
            _cpu.set_isa(active)


def inputs(case: Case, impl: str, dtype: torch.dtype = torch.float32, /, seed: int = 0, **sample: Any) -> Inputs:
    """Inputs for `impl`; the sample is the case's everything-trains one with a few options changed."""
    parameter_dtype = sample.pop("parameter_dtype", None)
    return case.inputs({**case.typical, **sample}, dtype, parameter_dtype, device=device(impl), seed=seed)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The distinct tensors that train among the arguments, under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in arguments(inputs).items():
        if isinstance(value, Tensor) and value.requires_grad:
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def frozen(inputs: Inputs) -> Inputs:
    """The same arguments, none of which trains."""
    memo: dict[int, Tensor] = {}

    def freeze(value: Any) -> Any:
        return memo.setdefault(id(value), value.detach()) if isinstance(value, Tensor) else value

    return {name: freeze(value) for name, value in arguments(inputs).items()}


def replaced(inputs: Inputs, name: str, value: Any) -> Inputs:
    """The arguments with one tensor replaced wherever it stands (a residual may be the input itself)."""
    old = inputs[name]
    return {key: value if given is old else given for key, given in arguments(inputs).items()}


class Recorder(TorchDispatchMode):
    """Keeps every call of one of this package's registered operators, with what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "petl_kernels":
            self.calls.append((func, args, result))
        return result


class _Nothing(TorchDispatchMode):
    """Fails on the first tensor operation; where an op takes indices, on the first but a look at int64 values."""

    def __init__(self, indices: bool) -> None:
        super().__init__()
        self._indices = indices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._indices and args and isinstance(args[0], Tensor) and args[0].dtype == torch.int64:
            return func(*args, **(kwargs or {}))
        raise AssertionError(f"{func} ran before the arguments were checked")


def check_refused(fn: Callable[..., Any], call: Inputs, error: type[Exception], message: str) -> None:
    """The op, and `explain` of it, raise an error in the op's name before anything is computed or written."""
    for refuse in (fn, partial(explain, fn)):
        with _Nothing("channels" in call or "task" in call), pytest.raises(error, match=f"^{fn.__name__}: .*{message}"):
            refuse(**call)
