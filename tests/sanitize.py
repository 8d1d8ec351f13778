"""Small calls of every op, for compute-sanitizer to watch: `make sanitize`, or `python tests/sanitize.py`.

Operands are made on the CPU and results are judged there, so that on the GPU little runs beside the kernels. Exit code
1 where a result is wrong; what the sanitizer finds is its own exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from petl_kernels.testing import CASES, Case, Inputs, Outcome, in_float64, judge, run

MOST_ROWS = 40  # a watched kernel takes a hundred times its time
DTYPES = (torch.float32, torch.bfloat16)


def calls(case: Case) -> Iterator[Mapping[str, Any]]:
    """The small ones of the table, and one of several tiles with everything and one without modifications."""
    yield {**case.typical, "n": 130}
    yield {**case.typical, "n": 130, "gate": None, "dropout": 0.0}
    yield from (sample for sample in case.samples if sample["n"] <= MOST_ROWS)


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same call on a device; what is one tensor stays one."""
    memo: dict[int, torch.Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().to(device).requires_grad_(value.requires_grad)
        return memo[id(value)]

    return {name: move(value) for name, value in inputs.items()}


def failures(case: Case, impl: str, device: str) -> Iterator[str]:
    """Every call of the case that the implementation computes, and what is wrong with it."""
    for dtype in DTYPES:
        for sample in calls(case):
            inputs = case.inputs(sample, dtype)
            there = moved(inputs, device)
            arguments = {name: value for name, value in there.items() if name != "grad_layout"}
            if case.op.unsupported(impl, *case.op.prepare(**arguments)):
                continue  # what it refuses, tests/table.py demands or not
            got = run(case.fn, there, impl=impl)
            ours = Outcome(got.output.cpu(), {name: grad.cpu() for name, grad in got.grads.items()})
            eager, exact = (run(case.fn, i, impl="reference") for i in (inputs, in_float64(inputs)))
            found = [f for f in judge(ours, eager, exact) if "vacuous" not in f]
            yield from (f"{case.name} {sample['id']} {dtype} {impl}: {f}" for f in found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton,cuda")
    parser.add_argument("--op", default=",".join(case.name for case in CASES))
    options = parser.parse_args(argv)
    wrong, ran = [], 0
    for case in CASES:
        for impl in options.impl.split(","):
            if case.name in options.op.split(",") and impl in case.op.impls:
                case.op.module(impl)  # what was not built is an error, not something to leave out
                wrong += failures(case, impl, options.device)
                ran += 1
    print(*wrong, f"{ran} implementations, {len(wrong)} wrong results", sep="\n")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
