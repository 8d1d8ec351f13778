"""Compile every launch setting of an op's Triton kernels for one target, without a GPU, and print what it takes.

    python tests/triton_compile.py bottleneck_adapter cuda 90

A process of its own, because Triton compiles nothing in a process that interprets. `triton_calls/<op>.py` names the
calls and, but for a last argument "some", `others` that take long to compile. Their real entry points choose the
settings and specialise the arguments, on tensors whose memory is never touched; launches become compilations.
One JSON line per distinct kernel: name, settings, registers, spilled bytes, shared memory.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from petl_kernels.ops import _triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly:
    """Triton's driver interface for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes spilled per thread and shared memory per program of a compiled kernel."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    else:
        usage = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s*(\d+)", kernel.asm["amdgcn"])}
        registers, spilled = usage["vgpr_count"], 4 * usage["vgpr_spill_count"]
        # Scalar registers spill into lanes of vector registers, not into memory: not counted.
    return dict(registers=registers, spilled=spilled, shared=kernel.metadata.shared)


def main(op: str, backend: str, arch: str, which: str = "every") -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32)
    triton.runtime.driver.set_active(CompileOnly(target))
    _triton.device_of = lambda device: _triton.Device(132, target.warp_size)
    seen = set()
    launch = triton.JITFunction.run

    def compile_once(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # What a width D_* changes is the trip count of loops, unrolled only where x is held.
        key = {name: value for name, value in options.items() if not name.startswith("D_") or options.get("HELD")}
        types = tuple(None if a is None else str(getattr(a, "dtype", type(a))) for a in args)
        identity = (self.fn.__name__, types, tuple(sorted(key.items())))
        if identity not in seen:
            seen.add(identity)
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            dtypes = sorted({t.removeprefix("torch.") for t in types if t and t.startswith("torch.")})
            print(
                json.dumps(dict(kernel=self.fn.__name__, dtypes=dtypes, **options, **resources(kernel)), default=str),
                flush=True,
            )

    triton.JITFunction.run = compile_once
    module = importlib.import_module(f"triton_calls.{op}")
    others = getattr(module, "others", tuple) if which == "every" else tuple
    for precision in itertools.chain(module.calls(), others()):
        _triton.precision = lambda precision=precision: precision


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main(*sys.argv[1:])
