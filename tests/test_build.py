"""The build: torch-free sources, a package without a compiler, errors where something was demanded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def report(tmp_path: Path) -> dict[str, dict[str, object]]:
    return json.loads((tmp_path / "lib" / "petl_kernels" / "_build.json").read_text())


def test_sources_know_nothing_of_torch() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if "torch" in line or "ATen" in line or "c10" in line], path
        assert path.parent.name == "bindings" or not [line for line in includes if "pybind" in line], path


def test_setup_stays_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 60


def test_without_a_compiler_the_package_installs_and_says_why(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))
    cpu = report(tmp_path)["cpu"]
    assert cpu["built"] is False and "/no/such/compiler" in str(cpu["reason"])


def test_demanded_kernels_fail_without_a_compiler(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="/no/such/compiler", PETL_KERNELS_CPU="1").returncode != 0


def test_switched_off(tmp_path: Path) -> None:
    assert build(tmp_path, PETL_KERNELS_CPU="0").returncode == 0
    assert report(tmp_path)["cpu"] == {"built": False, "reason": "switched off (PETL_KERNELS_CPU=0)"}


def test_demanded_cuda_fails_without_a_toolkit(tmp_path: Path) -> None:
    done = build(tmp_path, CUDACXX="/no/such/nvcc", PETL_KERNELS_CUDA="1")
    assert done.returncode != 0 and "CUDA" in done.stdout + done.stderr
