"""A copy of the tree in which kernels are broken, built and tested. The checkout itself is never touched."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from .tables import ROOT, Kernel, Mutation

FOLDERS = ("csrc", "petl_kernels", "tests", "examples", "benchmarks")
NOT_COPIED = re.compile(r"__pycache__|\.so$|\.pyc$|_build\.json$|^tests/mutations/")
MOST_SECONDS = 300  # of one step's tests, which take less than a minute
# What a mutation of Python makes that "does not compile": it says nothing about the tests.
WRONG = re.compile(
    r"^(?:FAILED|ERROR) .* - \S*(?:NameError|UnboundLocalError|SyntaxError|TypeError|AttributeError)", re.M
)
BIN = Path(sys.executable).parent
os.environ |= dict(PATH=f"{BIN}:{os.environ['PATH']}", OMP_WAIT_POLICY="passive", TRITON_INTERPRET="1", COLUMNS="400")
# Tests are forked from a process that has imported what takes most of their time, and nothing of this package.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "torch._dynamo.testing", "torch.testing._internal.two_tensor", "triton", "hypothesis", "pytest"]
)


class Invalid(Exception):
    """A mutation that does not compile says nothing about the tests."""


def _run(command: str, folder: Path, seconds: float = 3600, until: str | None = None) -> tuple[int, str]:
    """The status of a command and what it printed, at most up to a line that `until` matches, where it is stopped.

    The status is -SIGALRM when it took longer than that many seconds.
    """
    process = subprocess.Popen(
        command, shell=True, cwd=folder, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    overdue = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGALRM))
    overdue.start()
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if until and re.match(until, line):
            os.killpg(process.pid, signal.SIGKILL)
    overdue.cancel()
    return process.wait(), "".join(lines)


class _FewDraws:
    """Where a draw fails, the means of 32 decide, under the interpreter in minutes; of a broken kernel four do."""

    def pytest_collection_finish(self) -> None:
        if case := sys.modules.get("petl_kernels.testing._case"):
            case.DRAWS = 4


def _pytest(arguments: list[str], folder: Path, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import pytest

    status = int(pytest.main(arguments, [_FewDraws()]))
    sys.stdout.flush()
    os._exit(status)


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGALRM:
        return "does not end"
    number = -status if status < 0 else status - 128
    return f"crashes ({signal.Signals(number).name})" if number in set(signal.Signals) else f"fails with {status}"


class Workshop:
    def __init__(self, folder: Path) -> None:
        self.tree, self.build = folder / "tree", folder / "build"
        self.extension = self.tree / "petl_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"

    def prepare(self, builds: bool) -> None:
        """Bring the copy up to date and build all of it, unbroken; only what has changed is copied and built."""
        self.build.mkdir(parents=True, exist_ok=True)
        wanted = {Path("pyproject.toml")}
        for folder in FOLDERS:
            wanted |= {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()}
        wanted = {path for path in wanted if not NOT_COPIED.search(path.as_posix())}
        for path in (p for p in self.tree.rglob("*") if p.is_file()):
            if path.relative_to(self.tree) not in wanted and not NOT_COPIED.search(path.as_posix()):
                path.unlink()
        for path in wanted:
            to = self.tree / path
            if not to.exists() or to.read_bytes() != (ROOT / path).read_bytes():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, to)
        if builds:
            self.extension.unlink(missing_ok=True)  # a run that was killed may have left a broken one
            options = " ".join(f"-D{name}={shlex.quote(str(value))}" for name, value in self.options().items())
            for command in (f"cmake -S ../tree/csrc -B . -G Ninja {options}", "cmake --build ."):
                status, output = _run(command, self.build)
                if status:
                    raise SystemExit(output)

    def options(self) -> dict[str, Any]:
        """-Og compiles in half the time of -O1 and runs as fast; one instruction set is a fourth of the objects."""
        import pybind11

        return {
            "CMAKE_BUILD_TYPE": "None",
            "CMAKE_CXX_FLAGS": "-Og",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.extension.parent,
            "PETL_REPORT": self.extension.parent / "_build.json",
            "PETL_CPU_ISAS": _widest(),
            "PETL_CUDA": 0,
            "PETL_TESTS": "ON",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }

    @contextmanager
    def broken(self, mutation: Mutation) -> Iterator[None]:
        """The copy with this mutation inside the block, and as it was behind it, the times of its files too."""
        path = self.tree / mutation.file
        before, times = path.read_text(), path.stat()
        compiled = Path(cache_from_source(str(path)))  # believed by its source's size and second
        path.write_text(mutation.mutated(before))
        compiled.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.write_text(before)
            compiled.unlink(missing_ok=True)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def failing(self, kernel: Kernel, step: str) -> str | None:
        """Which test of this step fails, or None. A kernel in C++ is built first."""
        if step == kernel.program:
            self.link(kernel, f"tests/{step}")
            fails = f"FAIL .*{kernel.about}"
            status, output = _run(f"exec tests/{step}", self.build, MOST_SECONDS, until=fails)
            found = [line for line in output.splitlines() if re.match(fails, line)]
            if not found and status in (0, 1):  # nothing fails, or not of this kernel
                return None
            failure = re.sub(r": (error|got) .*", "", found[0].removeprefix("FAIL ")).strip() if found else ""
            return f"{step}: {failure or _how_it_ended(status)}"
        if kernel.language != "cpp":
            return self.pytest(step)
        unbroken = self.build / "unbroken.so"
        shutil.copy2(self.extension, unbroken)
        try:
            self.link(kernel, "_cpu")
            return self.pytest(step)
        finally:
            shutil.copy2(unbroken, self.extension)

    def pytest(self, tests: str) -> str | None:
        arguments = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *shlex.split(tests)]
        output = self.build / "pytest.txt"
        process = FORKS.Process(target=_pytest, args=(arguments, self.tree, output))
        process.start()
        process.join(MOST_SECONDS)
        status = -signal.SIGALRM if process.exitcode is None else process.exitcode
        process.kill()
        if status > 1 or WRONG.search(output.read_text()):  # nothing could be imported or collected, or the like
            raise Invalid(output.read_text())
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", output.read_text(), re.M)
        return None if not status else found[1] if found else f"{tests}: {_how_it_ended(status)}"

    def link(self, kernel: Kernel, target: str) -> None:
        """Compile the one object that a kernel is in, as CMake would, and link `target` with it in front of the others:
        what it shares with other kernels through headers is then taken from it.
        """
        source = f"{kernel.program}.cpp" if kernel.language == "cuda" else f"{kernel.name.removeprefix('cpp/')}.cpp"
        commands = self.commands(target)
        (compile,), link = [c for c in commands if c.endswith(f"/{source}")], commands[-1]
        own = re.search(r" -o (\S+)", compile)[1]
        # A test program is linked with its object itself, a kernel's comes out of the library.
        link = link.replace(own, "broken.o") if own in link else link.replace(" -o ", " broken.o -o ", 1)
        for command in (compile.replace(f" -o {own}", " -o broken.o"), link):
            status, output = _run(command, self.build)
            if status:
                raise Invalid(output)

    def commands(self, target: str) -> list[str]:
        return _run(f"ninja -t commands {shlex.quote(target)}", self.build)[1].splitlines()


def _widest() -> str:
    """The instruction set to build: the widest that runs here, which has every code path but the narrower vectors'."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return next((isa for flag, isa in (("avx512_bf16", "avx512bf16"), ("avx2", "avx2")) if flag in flags), "")
