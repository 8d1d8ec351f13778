"""What is demanded of each implementation, and the calls of `CASES` as pytest parameters.

The list is positive: an implementation that was not built fails its tests. `PETL_KERNELS_TEST_IMPLS=reference,cpp`
narrows them to some implementations, for work where the others cannot be.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels.testing import CASES, Case, Inputs, arguments

LOW = (torch.bfloat16, torch.float16)
DTYPES = {
    "reference": (torch.float32, *LOW, torch.float64),
    "cpp": (torch.float32, *LOW, torch.float64),
    "triton": (torch.float32, *LOW),
}


def impls(case: Case) -> list[str]:
    only = os.environ.get("PETL_KERNELS_TEST_IMPLS")
    return [name for name in case.op.impls if not only or name in only.split(",")]


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


def case_impl(of: Any = impls) -> list[Any]:
    """Parameters (case, impl)."""
    return [
        pytest.param(case, impl, id=f"{case.name}-{impl}", marks=marks(impl)) for case in CASES for impl in of(case)
    ]


def table() -> list[Any]:
    """Parameters (case, sample, impl, dtype)."""
    parameters = []
    for case in CASES:
        for impl in impls(case):
            for sample, dtype in product(case.samples, DTYPES[impl]):
                name = f"{case.name}-{sample['id']}-{impl}-{short(dtype)}"
                parameters.append(pytest.param(case, sample, impl, dtype, id=name, marks=marks(impl)))
    return parameters


def inputs(case: Case, impl: str, dtype: torch.dtype = torch.float32, /, seed: int = 0, **sample: Any) -> Inputs:
    """Inputs for `impl`; the sample is the case's everything-trains one with a few options changed."""
    parameter_dtype = sample.pop("parameter_dtype", None)
    return case.inputs({**case.typical, **sample}, dtype, parameter_dtype, device=device(impl), seed=seed)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The distinct tensors among the arguments, under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in arguments(inputs).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


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
