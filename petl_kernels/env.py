"""What this installation is and what it can run: the facts behind `petl-kernels env`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

import petl_kernels

VARIABLES = ("PETL_KERNELS_IMPL", "PETL_KERNELS_CPU_ISA", "TRITON_INTERPRET")
SWAPPABLE = ("adapters", "peft")


def report() -> dict[str, Any]:
    """Everything that decides which code runs here, as plain JSON values.

    Keys: "versions", "cpu", "built" (per extension: built, and why not), "cuda" (devices, or why none), "ops" (per op,
    device and dtype what `explain` says of a call), "environment" (variables in force), "swappable" (libraries that
    `petl_kernels.fuse` knows, with their versions or None).
    """
    return {
        "versions": {
            "petl_kernels": petl_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
        },
        "cpu": cpu(),
        "built": {"cpu": _cpu_extension(), "cuda": _recorded("cuda")},
        "cuda": cuda(),
        "ops": ops(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "swappable": {name: version_of(name) for name in SWAPPABLE},
    }


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def cpu() -> dict[str, Any]:
    """The CPU, the threads PyTorch uses and the instruction set its own kernels use."""
    return {
        "model": cpu_model(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def cuda() -> dict[str, Any]:
    """The CUDA devices with their compute capabilities, or the reason for none."""
    if not torch.backends.cuda.is_built():
        return {"devices": [], "reason": f"torch {torch.__version__} was built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "reason": "torch finds no usable CUDA device or driver"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {"devices": [f"{d.name} (sm_{d.major}{d.minor})" for d in devices], "reason": None}


def _recorded(extension: str) -> dict[str, Any]:
    """What the build wrote down about an extension."""
    record = resources.files("petl_kernels") / "_build.json"
    if not record.is_file():
        return {"built": False, "reason": "no build was recorded: the package runs from a checkout that was not built"}
    entry = json.loads(record.read_text()).get(extension)
    return entry or {"built": False, "reason": "the build did not consider it"}


def _cpu_extension() -> dict[str, Any]:
    try:
        from petl_kernels.ops._native import _cpu
    except ImportError as error:
        recorded = _recorded("cpu")
        # A build that succeeded and a library that does not load: the loader knows why, the record does not.
        return {"built": False, "reason": str(error) if recorded["built"] else recorded["reason"]}
    isas = {"built_isas": list(_cpu.built_isas()), "isas": list(_cpu.isas()), "isa": _cpu.isa()}
    return {"built": True, "reason": None, **isas}


def ops() -> dict[str, dict[str, Any]]:
    """Per op, device type and dtype: what runs the call it is told of, why, and why the others do not.

    The call is the op's first benchmark shape; of an optimizer's step, an eighth of the rows of one matrix.
    """
    from petl_kernels.testing import CASES, arguments

    found: dict[str, dict[str, Any]] = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in (torch.float32, torch.bfloat16):
            where = f"{device} {str(dtype).removeprefix('torch.')}"
            for case in CASES:
                inputs = arguments(case.inputs(case.bench[0], dtype, device=device))
                found.setdefault(case.name, {})[where] = _explained(case.fn, case.bench[0]["id"], inputs)
            for name, (fn, inputs) in _steps(dtype, device).items():
                found.setdefault(name, {})[where] = _explained(fn, "rows of 768x768", inputs)
    return found


def _explained(fn: Callable[..., Any], call: str, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        said = petl_kernels.explain(fn, **inputs)
    except (ValueError, RuntimeError) as error:  # what an impossible PETL_KERNELS_IMPL leads to
        return {"call": call, "chosen": None, "why": None, "others": {}, "error": str(error)}
    return {"call": call, "chosen": said.chosen, "why": said.why, "others": said.others}


def _steps(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A call of each optimizer's op."""
    from petl_kernels.ops.channel_adamw import channel_adamw_
    from petl_kernels.ops.channel_sgd import channel_sgd_

    param = torch.zeros(768, 768, dtype=dtype, device=device)
    state, step = torch.zeros_like(param[::8]), torch.zeros((), device=device)
    shared: dict[str, Any] = dict(params=[param], grads=[torch.zeros_like(param)], steps=[step], dims=[0], lr=0.1)
    shared["channels"] = [torch.arange(0, 768, 8, device=device)]
    moments = dict(exp_avgs=[state], exp_avg_sqs=[state.clone()], beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    return {
        "channel_adamw": (channel_adamw_, {**shared, **moments}),
        "channel_sgd": (channel_sgd_, {**shared, "momentum_buffers": [state], "momentum": 0.9}),
    }
