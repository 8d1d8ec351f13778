"""Hands csrc to CMake and Ninja; everything else is in pyproject.toml.

PETL_KERNELS_CUDA=auto|0|1 and PETL_KERNELS_CUDA_ARCHS choose the CUDA part. Without a working compiler the package
installs all the same, on PyTorch and Triton, and `petl-kernels env` gives the reason; PETL_KERNELS_CPU=1 makes that an
error and PETL_KERNELS_CPU=0 skips the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
NAMES = ("petl_kernels._cpu", "petl_kernels._cuda")


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:  # all in one run of CMake; _cuda where there is a toolkit
        target = Path(self.get_ext_fullpath(NAMES[0])).absolute().parent
        target.mkdir(parents=True, exist_ok=True)
        report = (CSRC.parent / "petl_kernels" if self.editable_mode else target) / "_build.json"
        wanted = os.environ.get("PETL_KERNELS_CPU", "auto")
        try:
            if wanted == "0":
                raise RuntimeError("switched off (PETL_KERNELS_CPU=0)")
            self.cmake(target, report)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wanted == "1" or os.environ.get("PETL_KERNELS_CUDA") == "1":
                raise
            output = getattr(error, "stdout", None) or str(error)
            print(f"petl_kernels: installing without compiled kernels:\n{output}", file=sys.stderr)
            reason = " ".join(output[-600:].split())
            status = {"built": False, "reason": reason}
            report.write_text(json.dumps({"cpu": status, "cuda": {**status, "archs": ""}}) + "\n")

    def cmake(self, target: Path, report: Path) -> None:
        import pybind11

        build = Path(self.build_temp).absolute()
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PETL_REPORT": report,
            "PETL_CUDA": os.environ.get("PETL_KERNELS_CUDA", "auto"),
            "PETL_CUDA_ARCHS": os.environ.get("PETL_KERNELS_CUDA_ARCHS", "80;86;90a;100;120"),
        }
        run = {"check": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        defined = [f"-D{k}={v}" for k, v in options.items()]
        subprocess.run(["cmake", "-S", CSRC, "-B", build, "-G", "Ninja", *defined], **run)
        subprocess.run(["cmake", "--build", build], **run)


setup(ext_modules=[Extension(n, sources=[], optional=True) for n in NAMES], cmdclass={"build_ext": CMakeBuild})
