"""Compile every launch setting of the Triton implementation for one target, without a GPU, and print what it takes.

    python tests/triton_compile.py cuda 90

A process of its own, because Triton compiles nothing in a process that interprets. The real entry points choose the
settings and specialise the arguments, on tensors whose memory is never touched; launches become compilations.
One JSON line per distinct kernel: name, settings, registers, spilled bytes, shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from petl_kernels.ops.bottleneck_adapter import triton as implementation

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


def calls() -> Iterator[tuple[str, tuple[int, int, int], torch.dtype, torch.dtype, str]]:
    """(activation, (n, d, r), dtype, parameters' dtype, float32 precision): every branch of the launch settings.

    bf16 stands for fp16, which has its width. bf16 beside fp32 parameters takes more of everything than bf16 alone,
    and plain fp32 more registers than tf32: the lighter ones are compiled at full tiles of r = 64 only. Where tiles
    are less than full, and of activations, the heaviest stand for the rest.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    full = 1 << 16
    for r in (16, 32, 64, 128, 256, 512):
        yield "gelu", (full, 768, r), bf16, fp32, "ieee"
        yield "gelu", (full, 512, r), fp32, fp32, "ieee"
    for r in (64, 512):
        yield "gelu", (5000, 1024, r), bf16, fp32, "ieee"
        yield "gelu", (512, 1024, r), bf16, fp32, "ieee"
        yield "gelu", (512, 1024, r), fp32, fp32, "ieee"
    yield "gelu", (full, 768, 64), bf16, bf16, "ieee"
    yield "gelu", (full, 512, 64), fp32, fp32, "tf32"
    yield "gelu_tanh", (full, 768, 64), bf16, fp32, "ieee"
    yield "gelu", (full, 8192, 64), bf16, fp32, "ieee"
    yield "gelu", (1000, 1000, 100), bf16, fp32, "ieee"


def call(activation: str, size: tuple[int, int, int], dtype: torch.dtype, parameters: torch.dtype) -> None:
    """Forward with x, with another and without residual, and a backward that wants everything."""
    n, d, r = size
    x, z = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up, scale = (torch.empty(k, dtype=parameters) for k in (r, d, d))
    weights = (w_down, b_down, w_up, b_up)
    implementation.forward(x, *weights, x, scale, 1.0, activation, True)
    implementation.forward(x, *weights, torch.empty_like(x), None, 2.0, activation, True)
    implementation.backward(x, x, z, *weights, scale, 1.0, activation, True, (True,) * 6)


def main(backend: str, arch: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32)
    triton.runtime.driver.set_active(CompileOnly(target))
    implementation._device = lambda device: implementation._Device(132, target.warp_size)
    seen = set()
    launch = triton.JITFunction.run
    precision = "ieee"

    def compile_once(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # What the width d changes is the trip count of loops, unrolled only where x is held.
        key = {name: value for name, value in options.items() if not name.startswith("D_") or options.get("HELD")}
        types = tuple(None if a is None else str(getattr(a, "dtype", type(a))) for a in args)
        identity = (self.fn.__name__, types, tuple(sorted(key.items())))
        if identity not in seen:
            seen.add(identity)
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            dtypes = sorted({t.removeprefix("torch.") for t in types if t and t.startswith("torch.")})
            print(json.dumps(dict(kernel=self.fn.__name__, dtypes=dtypes, **options, **resources(kernel))), flush=True)

    triton.JITFunction.run = compile_once
    implementation._precision = lambda: precision
    for activation, size, dtype, parameters, precision in calls():  # noqa: B007
        call(activation, size, dtype, parameters)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main(*sys.argv[1:])
