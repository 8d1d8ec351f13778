"""The benchmark driver: it times what is right, refuses what is wrong, and writes what others can read."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from table import case_impl, impls, kernels
from typer.testing import CliRunner

from petl_kernels.testing import CASES

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import run  # noqa: E402
import timing  # noqa: E402
from report import COLUMNS  # noqa: E402

SHAPE = "x".join(str(v) for k, v in CASES[0].host.items() if k != "id")
QUICK = ["--device", "cpu", "--shape", SHAPE, "--repeats", "3", "--no-compile", "--op", CASES[0].name]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is measured for publication here: no ceilings, few host calls, no lasting change of threads."""
    monkeypatch.setattr(run, "ceilings", lambda dtype, device: timing.Ceilings(1e11, 1e10))
    monkeypatch.setattr(run, "HOST_CALLS", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*args):
    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, [*QUICK, *args])


def available():
    """Implementations that run on the CPU and are no interpreter."""
    return [name for name in impls(CASES[0]) if name != "triton"]


def test_rows(tmp_path):
    path = tmp_path / "out.csv"
    result = bench("--impl", ",".join(available()), "--dtype", "float32,bfloat16", "--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    providers = {"eager", *(name for name in available() if name != "reference")}
    speeds = [row for row in rows if row["metric_name"] == "speed"]
    assert len(speeds) == len(providers) * 2 * 3  # dtypes, modes
    assert {row["kernel_provider"] for row in rows} == providers
    assert {row["kernel_operation_mode"] for row in rows} == {"forward", "full", "host"}
    for row in rows:
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 < low <= median <= high
        config = json.loads(row["extra_benchmark_config_str"])
        assert {"dtype", "threads", "isa", "torch", "commit"} <= set(config)
        assert config["n"] == CASES[0].host["n"]
        assert row["x_value"] == SHAPE and row["gpu_name"] and row["petl_kernels_version"]


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path):
    case, impl = next((p.values for p in case_impl(kernels) if p.values[1] in available()), (None, None))
    if impl is None:
        pytest.skip("PETL_KERNELS_TEST_IMPLS leaves no kernel")
    direction = case.op.directions["backward"]
    real = case.op.module(impl).backward

    def broken(*args):
        return tuple(torch.zeros_like(t) for t in real(*args))

    monkeypatch.setitem(direction._callables, impl, broken)
    monkeypatch.setattr(run, "measure", lambda *a: pytest.fail("it was timed"))
    result = bench("--impl", impl, "--csv", str(tmp_path / "out.csv"))
    assert result.exit_code == 1
    assert "nothing is timed" in result.output and f"{case.name} {SHAPE} float32 {impl}: d" in result.output
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--shape", "12"], "--shape must be"),
        (["--shape", "axbxc"], "--shape must be"),
        (["--mode", "backwards"], "--mode must be some of"),
        (["--dtype", "int8"], "--dtype must be some of"),
        (["--impl", "fast"], "--impl must be some of"),
        (["--isa", "mmx"], "--isa must be one of"),
        (["--op", "softmax"], "--op must be some of"),
    ],
)
def test_bad_options(args, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    result = bench(*args)
    assert result.exit_code == 2 and message in result.output


def test_an_explicit_implementation_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(run, "_unsupported", lambda *a: "it is a Tuesday")
    result = bench("--impl", CASES[0].op.impls[-1])
    assert result.exit_code == 1 and "is not timed: it is a Tuesday" in result.output


def test_rounds_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleave(calls, "cpu", 0.0, 4)
    assert order == list("abc") * 5  # one warm-up
    assert set(times) == set("abc")
    order.clear()
    timing.interleave(calls, "cpu", 0.0, None)
    assert order == list("abc") * (1 + timing.MIN_ROUNDS)


def test_emulated_instruction_set():
    """`--isa` starts the program again with the variables that torch reads when it loads."""
    command = [sys.executable, str(FOLDER / "run.py"), *QUICK, "--isa", "avx2", "--mode", "host", "--dtype", "float32"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([*command, "--impl", "reference"], capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "torch AVX2, oneDNN up to AVX2" in result.stdout
