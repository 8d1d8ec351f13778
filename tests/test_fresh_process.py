"""What only a new process shows: imports that must not be needed, and the very first call."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALL = """
import torch
from petl_kernels.testing import CASES, arguments, check
case = CASES[0]
call = arguments(case.inputs(case.host))
"""


def python(code: str, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PETL_", "TRITON_"))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=clean | env, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def block(*names: str) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


@pytest.mark.parametrize("missing, impl", [("triton", "triton"), ("petl_kernels._cpu", "cpp")])
def test_without_one_implementation_the_rest_works_and_says_why(missing, impl):
    code = f"""
assert check(case, case.inputs(case.host)) == []
try:
    case.fn(**call, impl={impl!r})
except RuntimeError as error:
    print(error)
"""
    said = python(block(missing) + CALL + code)
    assert f"impl='{impl}' cannot run this call: it cannot be imported here" in said


def test_triton_refuses_bfloat16_in_its_own_interpreter():
    code = """
for dtype in (torch.float32, torch.bfloat16):
    call = case.op.prepare(**arguments(case.inputs(case.host, dtype)))
    print(case.op.unsupported("triton", *call))
"""
    float32, bfloat16 = python(CALL + code, TRITON_INTERPRET="1").splitlines()
    assert float32 == "None" and "raw bits of bfloat16" in bfloat16


def test_without_any_kernel_the_reference_runs_compiled_too():
    code = """
assert check(case, call, torch.compile(case.fn, fullgraph=True, backend="aot_eager")) == []
from petl_kernels import explain
print(explain(case.fn, **call).chosen)
"""
    assert python(block("triton", "petl_kernels._cpu") + CALL + code) == "reference"


@pytest.mark.parametrize("impl", [None, "cpp"])
def test_the_first_call_may_be_compiled(impl):
    if impl is None or impl in os.environ.get("PETL_KERNELS_TEST_IMPLS", impl):
        fn = "torch.compile(case.fn, fullgraph=True, backend='aot_eager')"
        assert python(CALL + f"print(check(case, call, {fn}, impl={impl!r}))") == "[]"


def test_importing_takes_nothing_along():
    """Neither the optional libraries nor triton: it costs half a second that a CPU user never needs."""
    heavy = ("triton", "adapters", "transformers", "matplotlib", "rich", "typer")
    # Whatever torch itself imports is not ours.
    code = f"""
import sys, torch
before = set(sys.modules)
import petl_kernels, petl_kernels.nn, petl_kernels.testing
print([name for name in {heavy!r} if name in sys.modules and name not in before])
"""
    assert python(code) == "[]"
    assert python(block("adapters", "transformers", "matplotlib", "safetensors") + "import petl_kernels.nn") == ""
