"""`petl-kernels bench`: it times what is right, refuses what is wrong, and writes what others can read."""

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

from petl_kernels.benchmarking import cases, plots, provenance, timing
from petl_kernels.benchmarking.compare import compare
from petl_kernels.benchmarking.report import COLUMNS, Measurement
from petl_kernels.cli import app
from petl_kernels.testing import CASES

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import run  # noqa: E402

CASE = CASES[0]
SHAPE = "x".join(str(v) for k, v in CASE.host.items() if k != "id")
TINY = ["--device", "cpu", "--shape", SHAPE, "--repeats", "3", "--no-compile"]
LIMITS = timing.Ceilings(1e11, 1e10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is measured for publication here: no ceilings, few host calls, no lasting change of threads."""
    monkeypatch.setattr(timing, "ceilings", lambda dtype, device: LIMITS)
    monkeypatch.setattr(cases, "HOST_CALLS", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path):
    """The command on tiny calls, with its files in `tmp_path`."""

    def invoke(*args, op=CASE.name, tiny=TINY):
        return CliRunner().invoke(app, ["bench", op, *tiny, "--out", str(tmp_path), *args], env={"COLUMNS": "160"})

    return invoke


@pytest.fixture
def timed(monkeypatch):
    """What the command finds instead of measuring: milliseconds by (shape, implementation); eager takes 4."""
    times = {}

    def measure(job, plan, dtype, limits, say):
        for sample in job.samples:
            for name in ("eager", "cpp"):
                t = times.get((sample["id"], name), {"eager": 4.0, "cpp": 2.0}[name]) * 1e-3
                work = (job.case.cost(sample, "full")[0], 4 * job.case.cost(sample, "full")[1])
                yield Measurement(
                    job.case.name, name, "full", sample, dtype, timing.Quantiles(t, t, t), *work, limits, 8
                )

    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(cases, "failures", lambda *a: [])
    return times


def available():
    """Implementations that run on the CPU and are no interpreter."""
    return [name for name in impls(CASE) if name != "triton"]


def test_rows(bench, tmp_path):
    path = tmp_path / "else.csv"
    result = bench("--impl", ",".join(available()), "--dtype", "float32,bfloat16", "--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS and not (tmp_path / "bench.csv").exists()
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
        assert config["n"] == CASE.host["n"]
        assert row["x_value"] == SHAPE and row["gpu_name"] and row["petl_kernels_version"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["median_ms"] for row in found["rows"] if row["mode"] != "host"] == pytest.approx(
        [float(row["y_value_50"]) for row in speeds if row["kernel_operation_mode"] != "host"], rel=1e-5
    )
    assert set(found["provenance"]) == set(provenance.provenance("cpu"))
    for row in found["rows"]:
        assert row["speedup"] == (1 if row["impl"] == "eager" else pytest.approx(row["speedup"])) and row["low_ms"] > 0


def test_json_is_all_that_is_printed(bench, tmp_path, timed):
    result = bench("--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    row = next(row for row in found["rows"] if row["impl"] == "cpp")
    flops, elements = CASE.cost(CASE.host, "full")
    assert row["speedup"] == pytest.approx(2) and row["gbs"] == pytest.approx(4 * elements / 2e-3 / 1e9)
    ideal = max(flops / LIMITS.flops, 4 * elements / LIMITS.bytes)
    assert row["ceiling_percent"] == pytest.approx(100 * ideal / 2e-3)
    assert found["ceilings"] == {name: {"gflops": 100, "gbs": 10} for name in ("float32", "bfloat16")}


def test_a_wrong_kernel_is_not_timed(bench, monkeypatch, tmp_path):
    case, impl = next((p.values for p in case_impl(kernels) if p.values[1] in available()), (None, None))
    if impl is None:
        pytest.skip("PETL_KERNELS_TEST_IMPLS leaves no kernel")
    direction = case.op.directions["backward"]
    real = case.op.module(impl).backward

    def broken(*args):
        return tuple(torch.zeros_like(t) for t in real(*args))

    monkeypatch.setitem(direction._callables, impl, broken)
    monkeypatch.setattr(cases, "measure", lambda *a: pytest.fail("it was timed"))
    result = bench("--impl", impl, "--json", op=case.name)
    assert result.exit_code == 1 and "nothing is timed" in result.stderr
    found = json.loads(result.stdout)
    assert found["wrong"][0].startswith(f"{case.name} {SHAPE} float32 {impl}: d") and found["rows"] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, message",
    [
        (["--shape", "12"], "--shape must be"),
        (["--shape", "axbxc"], "--shape must be"),
        (["--mode", "backwards"], "--mode must be some of"),
        (["--dtype", "int8"], "--dtype must be some of"),
        (["--impl", "fast"], "--impl must be some of"),
        (["--isa", "mmx"], "--isa must be one of"),
        (["softmax"], "OP must be some of"),
        (["--device", "tpu"], "--device has to be"),
        (["--fail-above", "5%"], "--fail-above needs --compare"),
        (["--fail-above", "much", "--compare", __file__], "has to be a percentage"),
        (["--compare", __file__], "is no record of `petl-kernels bench`"),
    ],
)
def test_bad_options(args, message, bench):
    result = bench(*args)
    assert result.exit_code == 2 and message in result.output


def test_what_is_not_here(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench("--plot")
    assert result.exit_code == 3 and "pip install 'petl-kernels[bench]'" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--device", "cuda").exit_code == 3
    monkeypatch.setattr(cases, "_unsupported", lambda *a: "it is a Tuesday")
    result = bench("--impl", CASE.op.impls[-1])
    assert result.exit_code == 3 and "is not timed: it is a Tuesday" in result.output


def test_a_quick_run_says_what_it_leaves_out(bench, timed, monkeypatch):
    result = bench("--quick", tiny=["--device", "cpu"])
    assert result.exit_code == 0 and CASE.bench[0]["id"] in result.output
    others = f"{len(CASE.bench) - 1} other shapes, forward mode, host mode, bfloat16, torch.compile"
    assert f"left out: by --quick: {others}" in result.output
    monkeypatch.setattr(sys.modules["petl_kernels.cli.bench"], "QUICK_SECONDS", -1)
    result = bench("--quick", tiny=["--device", "cpu"])
    assert result.exit_code == 0 and f"left out: for lack of time: {CASE.name} float32" in result.output


def test_without_a_compiler_the_others_are_timed(bench, timed, monkeypatch):
    def refuse(fn, **options):
        raise ValueError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    result = bench(tiny=[arg for arg in TINY if arg != "--no-compile"])
    assert result.exit_code == 0 and "left out: torch.compile: no compiler\n" in result.output


def test_every_op_has_its_calls_for_the_plots():
    plan = cases.Plan(CASES, None, ["full"], ["float32"], "cpu", quick=True, sweep=True)
    for case in CASES:
        first, *sweep = cases.samples(case, plan)
        assert first in case.bench and len({sample["n"] for sample in sweep}) == len(sweep) >= 3
        assert all({**sample, "n": 0, "id": 0} == {**case.bench[0], "n": 0, "id": 0} for sample in sweep)
        case.inputs(sweep[0])  # can be made


def test_regressions(bench, timed, tmp_path):
    """Exit code 4 and the worst first; baselines do not count, their drift is told; what is not compared is named."""
    limits = ["--compare", str(tmp_path / "old.json"), "--fail-above", "5%"]
    shapes = ["--dtype", "float32", "--shape", "8x16x8", "--shape", "9x16x8"]
    assert bench(*shapes).exit_code == 0
    old = json.loads((tmp_path / "bench.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert bench(*shapes, *limits).exit_code == 0
    timed |= {(SHAPE, "cpp"): 2.2, ("8x16x8", "cpp"): 2.08, ("9x16x8", "cpp"): 3.0}
    result = bench(*shapes, *limits)
    assert result.exit_code == 4 and "2 slower" not in bench(*shapes, *limits[:2]).output
    assert result.output.index("+50.0 %") < result.output.index("+10.0 %") and "+4.0 %" not in result.output
    assert "3 rows of kernels compared: 2 slower, 0 faster by over 5 %" in result.output
    assert "2 medians rose by more than 5 %" in result.stderr
    assert [c["shape"] for c in json.loads(bench(*shapes, *limits, "--json").stdout)["comparison"]["slower"]] == [
        "9x16x8",
        SHAPE,
    ]
    timed |= {(shape, "eager"): 8.0 for shape in (SHAPE, "8x16x8", "9x16x8")}
    assert "PyTorch itself takes 2.00 times what it took" in bench(*shapes, *limits).output
    old["provenance"]["threads"] = "128"
    (tmp_path / "old.json").write_text(json.dumps(old))
    result = bench(*shapes, *limits)
    assert result.exit_code == 5 and "threads '128' then" in result.output and "nothing to judge by" in result.stderr


def record(commit="1234", **medians):
    rows = [
        dict(op=CASE.name, impl=i, mode="full", shape="s", dtype="float32", median_ms=m) for i, m in medians.items()
    ]
    origin = dict(machine="m", isa="i", threads="2", torch="2.9", triton="3", petl_kernels="0.1", commit=commit)
    return {"provenance": origin, "rows": rows}


def test_a_comparison_names_what_it_does_not_cover():
    new = record(cpp=1.0, triton=1.0)
    new["provenance"]["torch"] = "2.13"
    found = compare(record("unknown", cpp=1.0, cuda=1.0), new)
    assert [change.percent for change in found.changes] == [0] and found.drift is None
    assert found.remarks == [
        "the old file names no commit",
        "torch 2.9 then, 2.13 now",
        f"in the old file, not measured now: {CASE.name} s float32 full cuda",
        f"measured now, not in the old file: {CASE.name} s float32 full triton",
    ]
    assert compare(record("12+", cpp=1.0), record(cpp=1.0)).remarks == [
        "the old file was measured on changes that its commit 12 does not have"
    ]


def test_an_installed_package_names_no_commit_of_somebody_else(tmp_path, monkeypatch):
    assert provenance.commit().rstrip("+") != provenance.UNKNOWN
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() == provenance.UNKNOWN
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == provenance.UNKNOWN


def test_plots(bench, timed, tmp_path):
    args = ["--plot", "--shape", "8x16x8", "--shape", "32x16x8", "--dtype", "float32,bfloat16"]
    result = bench(*args)
    assert result.exit_code == 0, result.output
    for name in ("speedup", "roofline", "cost"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"{name}.png" in result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    found["rows"] = [row for row in found["rows"] if row["shape"] == SHAPE]
    (tmp_path / "few").mkdir()
    assert [path.stem for path in plots.draw(found, tmp_path / "few")] == ["speedup", "roofline"]  # one N is no curve


def test_names_in_plots_keep_their_distance():
    places = plots._spread([1.0, 1.1, 5.0, 1.05], 0.5)
    first, second, third = (places[i] for i in (0, 3, 1))
    assert places[2] == 5 and first + second + third == pytest.approx(3.15)
    assert second - first >= 0.499 and third - second >= 0.499


def test_run_py_passes_its_options_on(tmp_path, monkeypatch, timed):
    program = typer.Typer()
    program.command()(run.main)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(program, [*TINY, "--op", CASE.name, "--dtype", "float32", "--csv", "found.csv"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]
    with (tmp_path / "found.csv").open() as file:
        assert {row["kernel_name"] for row in csv.DictReader(file)} == {CASE.name}
    assert CliRunner().invoke(program, ["--suite", "tpu"]).exit_code == 2


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
    command = [sys.executable, str(FOLDER / "run.py"), *TINY, "--op", CASE.name, "--isa", "avx2", "--mode", "host"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command += ["--dtype", "float32", "--impl", "reference"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "torch AVX2, oneDNN up to AVX2" in result.stdout


def test_pytest_benchmark_runs_by_itself(tmp_path):
    name = f"{CASE.name}-{SHAPE}-full-reference"
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--benchmark-only", "-k", name, "-p", "no:cacheprovider"]
    command += ["--benchmark-json", str(tmp_path / "found.json"), "--benchmark-max-time", "0.01"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # a worker's disable benchmarks
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=FOLDER.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert found["group"] == f"{CASE.name} {SHAPE} full" and found["extra_info"]["GB/s"] > 0
