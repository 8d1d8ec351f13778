"""Where a figure comes from: the machine, the versions, the commit."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import petl_kernels
from petl_kernels.env import cpu_model, version_of

# Read when torch loads, so `--isa` sets them and starts the program again. They make an emulated older machine of this
# one for PyTorch's own kernels (oneDNN, ATen, MKL) and for ours.
ISA_VARIABLES = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PETL_KERNELS_CPU_ISA": "avx2",
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "PETL_KERNELS_CPU_ISA": "avx512",
    },
}
UNKNOWN = "unknown"


def provenance(device: str) -> dict[str, str]:
    """The machine, the versions, the commit and the time, as printed above every table."""
    machine = cpu_model() if device == "cpu" else torch.cuda.get_device_name()
    return {
        "machine": machine,
        "isa": isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version_of("triton") or "none",
        "petl_kernels": petl_kernels.__version__,
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
    }


def isa() -> str:
    """The instruction sets of PyTorch's kernels and of ours."""
    ours = "no C++ kernels"
    try:
        from petl_kernels.ops._native import _cpu

        ours = f"petl_kernels {_cpu.isa()}"
    except ImportError:
        pass
    emulated = f", oneDNN up to {limit}" if (limit := os.environ.get("ONEDNN_MAX_CPU_ISA")) else ""
    return f"torch {torch.backends.cpu.get_cpu_capability()}{emulated}, {ours}"


def commit() -> str:
    """The commit of this checkout, with "+" behind it where files differ from it; "unknown" of an installed package."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True).stdout.strip()

    try:
        # An environment may lie inside a repository that knows nothing of the package in it.
        head = git("rev-parse", "--short=12", "HEAD") if git("ls-files", Path(__file__).name) else ""
        return (head + ("+" if git("status", "--porcelain") else "")) if head else UNKNOWN
    except OSError:  # no git
        return UNKNOWN
