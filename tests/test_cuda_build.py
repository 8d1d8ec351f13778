"""The CUDA extension as built: for which architectures, with which resources, and that it imports without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from petl_kernels.env import report

ARCHS = os.environ.get("PETL_KERNELS_CUDA_ARCHS", "80;86;90a;100;120").split(";")


def extension() -> Path:
    """The built module; where a toolkit is and nobody switched it off it has to be there."""
    found = importlib.util.find_spec("petl_kernels._cuda")
    if found is None:
        reason = str(report()["built"]["cuda"]["reason"])
        if "no CUDA toolkit" in reason or "switched off" in reason or shutil.which("nvcc") is None:
            pytest.skip(f"petl_kernels._cuda was not built: {reason}")
        pytest.fail(f"there is a toolkit, but no petl_kernels._cuda: {reason}")
    assert found.origin is not None
    return Path(found.origin)


@cache
def cuobjdump(*options: str) -> str:
    """What the disassembler says; Triton's wheel brings one where the toolkit has none."""
    module, tool = extension(), shutil.which("cuobjdump")
    if tool is None:
        triton = importlib.util.find_spec("triton")
        if triton is None or triton.origin is None:
            pytest.skip("neither the toolkit nor Triton has cuobjdump")
        tool = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return subprocess.run([tool, *options, str(module)], check=True, capture_output=True, text=True).stdout


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Per architecture and kernel, registers, stack, local and shared memory."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            kernels = found.setdefault(line.removeprefix("arch = sm_"), {})
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").removesuffix(":")
        elif line.startswith("  REG:"):
            kernels[name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
    return {arch: kernels for arch, kernels in found.items() if kernels}


def test_machine_code_for_every_architecture_and_ptx_of_the_newest():
    assert set(re.findall(r"\.sm_(\w+)\.cubin", cuobjdump("--list-elf"))) == set(ARCHS)
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("--list-ptx"))) == {ARCHS[-1]}


def test_nothing_spills():
    found = resources()
    assert sorted(found) == sorted(ARCHS)
    kernels = found[ARCHS[0]].keys()
    of_sm90 = {name for name in found.get("90a", {}) if "sm90_kernel" in name}
    assert len(of_sm90) == 4 * ("90a" in ARCHS)  # forward and backward, of two dtypes
    for kernel in (
        "adapter_rows",
        "norm_rows",
        "tall_products",
        "channel_rows",
        "channel_gradient_sums",
        "channel_importance",
        "channel_step",
    ):
        assert any(f"{kernel}_kernel" in name for name in kernels), kernel
    for arch, of_arch in found.items():
        assert of_arch.keys() == kernels | (of_sm90 if arch == "90a" else set())
        for name, used in of_arch.items():
            assert used["STACK"] == 0 and used["LOCAL"] == 0, (arch, name, used)
            assert used["SHARED"] <= 1024 + 48 * 1024, (arch, name, used)  # from sm_90 on 1 KiB is the system's


def test_products_run_on_tensor_cores():
    """Every kernel that multiplies, in the oldest and the newest machine code (disassembling all takes 9 s)."""
    for arch in (ARCHS[0], ARCHS[-1]):
        kernels = cuobjdump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]
        names = ("adapter_rows_kernel", "norm_rows_kernel", "tall_products_kernel", "channel_rows_kernel")
        multiplies = [k for k in kernels if any(name in k[:200] for name in names)]
        assert multiplies
        for kernel in multiplies:
            assert "HMMA.16816" in kernel or "HMMA.1688" in kernel, (arch, kernel[:100])
            assert "LDL" not in kernel and "STL" not in kernel, (arch, kernel[:100])


def test_wgmma_and_tma_where_they_were_meant():
    """HGMMA, loads and stores by TMA and waits for them: in every kernel of sm_90a's own, and nowhere else."""
    if "90a" not in ARCHS:
        pytest.skip("built without sm_90a")
    kernels = cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:]
    for kernel in kernels:
        name = kernel.split("\n")[0]
        for instruction in ("HGMMA.64x64x16.F32", "UTMALDG.2D", "UTMASTG.2D", "SYNCS.PHASECHK"):
            assert (instruction in kernel) == ("sm90_kernel" in name), (name, instruction)
        if "sm90_kernel" in name:
            assert "LDL" not in kernel and "STL" not in kernel and "HMMA.168" not in kernel, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_it_imports_without_a_gpu_and_a_call_fails_in_words():
    extension()
    call = "(0, 0, 1, 49152, False), (1, 1, 1, 1), *[None] * 8, 0, 0, 0.0, 1.0, 0, None, None"
    code = f"import petl_kernels._cuda as c; c.bottleneck_forward({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: CUDA driver" in done.stderr, done.stderr
