"""The GPU's suite, rehearsed on the CPU: what it plans, how it measures, what it refuses, and the table made of it."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from table import demanded
from typer.testing import CliRunner

from petl_kernels.benchmarking import libraries
from petl_kernels.benchmarking.report import COLUMNS, write_csv
from petl_kernels.benchmarking.timing import Quantiles
from petl_kernels.ops import _measured
from petl_kernels.testing import CASES, check

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import crossover  # noqa: E402
import gpu.run  # noqa: E402
import gpu.suite  # noqa: E402
import run  # noqa: E402
from gpu import clocks, lora, plan, steps  # noqa: E402
from gpu.device import Cuda, Rehearsal  # noqa: E402
from gpu.report import Measurement  # noqa: E402

ADAPTER = CASES[0]
needs_cpp = pytest.mark.skipif(not demanded("cpp"), reason="PETL_KERNELS_TEST_IMPLS leaves the C++ kernels out")
needs_triton = pytest.mark.skipif(
    lora.kernels is None or not demanded("triton") or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter runs them",
)


def bench(*args):
    app = typer.Typer()
    app.command()(run.main)
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["--suite", "gpu", *args])
    torch.set_num_threads(threads)
    return result


def clock(*times):
    """A clock that shows these times one after the other, and the last for ever."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def hurry(monkeypatch):
    """As few calls as show that everything is called."""
    for name in ("ROUNDS", "MOST_CALLS", "LAUNCHED"):
        monkeypatch.setattr(clocks, name, 1)
    monkeypatch.setattr(clocks, "MOST_COPIES", 2)
    monkeypatch.setattr(libraries, "LIBRARIES", {})  # whose import takes longer than all the rest
    monkeypatch.setattr(gpu.run, "TINY", replace(gpu.run.TINY, layers=1))


@needs_cpp
def test_a_rehearsal_writes_every_figure(tmp_path, monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setattr(steps, "METHODS", {"houlsby": steps.METHODS["houlsby"]})
    monkeypatch.setattr(gpu.run, "REHEARSED", plan.Grid((8,), (16,), (4,), (8, 16, 4)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "rehearsal.csv"
    result = bench("--rehearse", "--no-compile", "--impl", "cpp", "--minutes", "5", "--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    metrics = Counter(row["metric_name"] for row in rows if row["kernel_name"] == ADAPTER.name)
    assert {"gpu_cold", "gpu_hot", "wall", "host", "bandwidth", "copy", "saved", "peak"} <= set(metrics)
    for case in CASES:
        own = [row for row in rows if row["kernel_name"] == case.name]
        assert {row["kernel_operation_mode"] for row in own} == set(
            gpu.suite.MODES if case.differentiable else ("forward",)
        )
        assert {"eager", "cpp", *case.baselines} <= {row["kernel_provider"] for row in own}
        assert all(len(json.loads(row["extra_benchmark_config_str"])["sizes"].split("x")) >= 2 for row in own)
    found = [row for row in rows if row["kernel_name"] == "training_step"]
    assert {row["kernel_provider"] for row in found} == {"frozen", "eager", "fused"}
    assert {row["x_value"] for row in found} == {f"{m}-{how}-2" for m in ("bert", "vit") for how in steps.METHODS}
    if lora.runs_on("cpu"):
        assert "two-GEMM LoRA" in {row["kernel_provider"] for row in rows}
    for row in rows:
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 <= low <= median <= high
    assert len(list(tmp_path.glob("rehearsal-*.png"))) == len(CASES) + 1  # and the steps


@needs_cpp
def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    real = ADAPTER.op.module("cpp").backward
    broken = lambda *args: tuple(torch.zeros_like(t) for t in real(*args))  # noqa: E731
    monkeypatch.setitem(ADAPTER.op.directions["backward"]._callables, "cpp", broken)
    monkeypatch.setattr(gpu.suite, "times", lambda *a: pytest.fail("it was timed"))
    monkeypatch.setattr(gpu.run, "REHEARSED", plan.Grid((8,), (16,), (4,), (8, 16, 4)))
    path = tmp_path / "out.csv"
    result = bench("--rehearse", "--no-compile", "--impl", "cpp", "--op", ADAPTER.name, "--csv", str(path))
    assert result.exit_code == 1 and not path.exists()
    assert "nothing is recorded" in result.output and f"{ADAPTER.name} 8x16x4 bfloat16 cpp: d" in result.output


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench()
    assert result.exit_code == 1 and "needs a CUDA device" in result.output


def test_the_plan_begins_with_what_matters():
    units = plan.units(CASES, plan.Grid())
    labels = [unit.label for unit in units]
    assert len(set(labels)) == len(labels)
    assert labels[0] == "bottleneck_adapter 4096x768x64 bfloat16"
    assert {unit.case.name for unit in units[: 3 + len(CASES)]} == {case.name for case in CASES}
    star = [unit.sample for unit in units if unit.case is ADAPTER and not unit.lora][:24]
    for key, sizes in (("n", plan.ROWS), ("d", plan.WIDTHS), ("r", plan.RANKS)):
        assert {sample[key] for sample in star} == set(sizes)  # every size within the first two dozen
    assert all(unit.case is ADAPTER for unit in units if unit.lora)
    assert {unit.dtype for unit in units} == {"bfloat16", "float32"}
    for unit in units[:60]:
        rows = unit.sample["n"] * torch.Size(unit.sample.get("tokens", ())).numel()
        assert rows in plan.ROWS or rows == 12608 // 128 * 128  # the bank's rows are samples of 128 tokens


def test_the_budget_keeps_what_does_not_fit_from_beginning():
    budget = plan.Budget(100, clock(0, 0, 30, 30, 30, 71, 71), {"late": 40})
    budget.run("a", lambda: None)  # from 0 to 30
    assert budget.allows("a") and not budget.allows("a", until=0.5) and not budget.allows("a", share=0.5)
    assert not budget.allows("a")  # at 71, and one takes 30
    assert budget.allows("b") and not budget.allows("late")


class Driver:
    """Stands in for torch.cuda: writes down what is asked of it."""

    def __init__(self):
        self.log: list[str] = []
        self.total_memory, self.L2_cache_size, self.major, self.minor, self.name = 1 << 36, 1 << 25, 9, 0, "a GPU"

    def __getattr__(self, asked):
        def answer(*args, **kwargs):
            self.log.append(asked)
            answers = {
                "memory_allocated": 100,
                "max_memory_allocated": 350,
                "elapsed_time": 4.0,
                "stream": nullcontext(),
            }
            return answers.get(asked, self)

        return answer


def test_what_the_suite_asks_of_cuda(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch, "cuda", driver)
    device = Cuda()
    assert (device.name, device.capability, device.l2_bytes) == ("a GPU", "9.0", 1 << 25)
    assert device.seconds(lambda: None) == 4e-3
    assert device.peak_bytes(lambda: driver.log.append("call")) == 250
    assert driver.log.index("memory_allocated") < driver.log.index("call") < driver.log.index("max_memory_allocated")
    driver.log.clear()
    replay = device.capture(lambda: driver.log.append("call"))
    assert [x for x in driver.log if x != "stream"] == [
        "synchronize",
        "CUDAGraph",
        "capture_begin",
        "call",
        "capture_end",
    ]
    replay()
    assert driver.log[-1] == "replay"

    def refused():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture(refused)
    assert driver.log[-1] == "capture_end"  # or nothing could be launched on the stream any more


class Recording(Rehearsal):
    """Keeps what every graph called, and cannot capture the provider named "host-bound"."""

    def __init__(self, log):
        self.log, self.graphs = log, []

    def capture(self, call):
        self.log.clear()
        call()
        if self.log[0][0] == "host-bound":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.graphs.append(list(self.log))
        return lambda: None


def test_cold_calls_take_turns_among_copies_and_hot_ones_do_not():
    log: list[tuple[str, int]] = []
    device = Recording(log)
    providers = {
        name: [lambda name=name, i=i: log.append((name, i)) for i in range(3)] for name in ("ours", "host-bound")
    }
    found, notes = clocks.times(device, providers)
    cold, hot = device.graphs
    assert {i for _, i in cold} == {0, 1, 2} and [i for _, i in cold[:6]] == [0, 1, 2, 0, 1, 2]
    assert {i for _, i in hot} == {0} and len(hot) == len(cold) == clocks.MOST_CALLS
    assert found["ours"].cold is not None and found["ours"].wall.median >= found["ours"].host.median
    assert found["host-bound"].cold is None and found["host-bound"].wall.median > 0
    assert notes == ["host-bound is not captured: operation not permitted when stream is capturing"]


def test_copies_are_twice_the_cache():
    device = Rehearsal()
    assert clocks.copies(device, device.l2_bytes // 4) == 8
    assert clocks.copies(device, 10 * device.l2_bytes) == 1
    assert clocks.copies(device, 1) == clocks.MOST_COPIES


@needs_triton
@pytest.mark.parametrize("n, d, d_out, r", [(70, 48, 48, 8), (33, 100, 72, 16), (300, 40, 130, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_two_gemm_kernel_is_right(n, d, d_out, r, dtype):
    sample = dict(n=n, d=d, d_out=d_out, r=r, scale=2.0, **plan.LORA)
    inputs = ADAPTER.inputs(sample, dtype)
    assert gpu.suite.astray(ADAPTER, inputs, lora.bottleneck_adapter) == []
    if dtype == torch.float32:  # in bfloat16 it rounds the bottleneck where eager does not
        assert check(ADAPTER, inputs, lora.bottleneck_adapter) == []


def suite(**options):
    return gpu.suite.Suite(Rehearsal(), plan.Budget(60), Console(quiet=True), **options)


@needs_cpp
def test_a_wrong_step_is_not_timed(monkeypatch):
    real = ADAPTER.op.module("cpp").backward

    def broken(*args):
        dx, *grads = real(*args)
        return torch.zeros_like(dx), *grads

    monkeypatch.setitem(ADAPTER.op.directions["backward"]._callables, "cpp", broken)
    monkeypatch.setattr(steps, "times", lambda *a: pytest.fail("it was timed"))
    monkeypatch.setattr(steps, "METHODS", {"houlsby": steps.METHODS["houlsby"]})
    wrong = steps.measure(suite(kernels=["cpp"], compile=False), {"bert": gpu.run.tiny_bert}, (2,))
    assert len(wrong) == 1 and "bert houlsby: the fused gradient is off by" in wrong[0]


@needs_cpp
def test_what_is_compiled_is_timed_beside_its_graph(monkeypatch):
    """With Dynamo's plain backend: what Inductor would generate is not the matter here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    hurry(monkeypatch)
    found = suite(kernels=["cpp"])
    case = next(case for case in CASES if not case.differentiable)
    found.time([plan.Unit(case, plan.sample(case, 8, 16, None), "float32")])
    compiled = {"compile", "compile+graph", "max-autotune", "max-autotune+graph"}
    assert {m.provider for m in found.found} == {"eager", "cpp", *compiled, *case.baselines}, found.notes
    monkeypatch.setattr(steps, "METHODS", {"houlsby": steps.METHODS["houlsby"]})
    assert steps.measure(found, {"bert": gpu.run.tiny_bert}, (2,)) == []
    providers = [m.provider for m in found.found if m.kernel == "training_step"]
    assert sorted(providers) == ["compile", "eager", "frozen", "fused", "fused+compile"] and not found.notes


def test_what_does_not_compile_is_noted_and_the_others_are_timed(monkeypatch):
    def refuse(fn, **options):
        def call(**kwargs):
            raise ValueError("no such backend")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    found = suite(kernels=[])
    found.time([plan.Unit(ADAPTER, plan.sample(ADAPTER, 8, 16, 4), "float32")])
    assert {m.provider for m in found.found} == {"eager"}
    assert found.notes[0] == "bottleneck_adapter 8x16x4 float32: compile failed: no such backend"


@pytest.mark.parametrize("make", [gpu.run.tiny_bert, gpu.run.tiny_vit])
@pytest.mark.parametrize("method", [*steps.METHODS])
def test_a_step_trains_what_the_method_says(make, method):
    model = steps.build(make, steps.METHODS[method], "cpu")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    place = {"houlsby": "after_", "parallel": "beside_ffn", "channels": "channel_weight"}[method]
    assert all(place in name for name in trained - {"head.weight", "head.bias"})
    step = steps.Step(model, model.batch(3, "cpu"), "reference")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if demanded("cpp"):
        assert steps.wrong(make, method, suite(), step.inputs) == []
    losses = [step.loss().item() for _ in range(5) if step() is None]
    changed = {name for name, value in before.items() if not torch.equal(value, dict(model.named_parameters())[name])}
    assert {"head.weight", "head.bias"} <= changed and len(changed) > 2
    assert losses[-1] < losses[0]


def measurement(provider, wall, cold, sizes=(4096, 768, 64), dtype="bfloat16", name=None, mode="full"):
    exactly = [None if t is None else Quantiles(t, t, t) for t in (cold, cold, wall, wall)]
    sample = {"id": name or "x".join(map(str, sizes)), "n": sizes[0]}
    return Measurement(ADAPTER.name, provider, mode, sample, dtype, clocks.Times(*exactly), 0, 1e12, "9.0", sizes)


def test_the_crossover_table_says_who_was_faster(tmp_path, monkeypatch):
    origin = dict.fromkeys(("threads", "isa", "torch", "triton", "commit", "timestamp", "petl_kernels"), "")
    origin["machine"] = "NVIDIA H100 80GB HBM3"
    small, other = (512, 768, 64), (4096, 768, 8)
    rows = [
        *(measurement(p, w, c) for p, w, c in [("eager", 4, 4), ("compile", 5, 2), ("triton", 2, 1), ("cuda", 1, 1.5)]),
        measurement("triton", 9, 9, mode="forward"),  # does not decide: both directions do
        *(measurement(p, w, c, small) for p, w, c in [("eager", 2, 2), ("compile", 3, 1), ("triton", 1.98, 2)]),
        # Two calls of the same sizes count together; here nothing was compiled, and one kernel was not captured.
        *(
            measurement(p, w, None, other, name=i)
            for i in "ab"
            for p, w in [("eager", 2), ("cuda", 1 if i == "a" else 3)]
        ),
    ]
    write_csv(tmp_path / "h100.csv", rows, origin)
    table = tmp_path / "crossover.csv"
    crossover.main([tmp_path / "h100.csv", *sorted((FOLDER / "results").glob("*.csv"))], table)
    lines = table.read_text().splitlines()
    where = "NVIDIA H100 80GB HBM3,9.0,bottleneck_adapter,bfloat16"
    assert lines == [
        ",".join(_measured.COLUMNS),
        f"{where},512x768x64,,",
        f"{where},4096x768x8,cuda,?",
        f"{where},4096x768x64,cuda triton,triton cuda",
    ]
    monkeypatch.setattr(_measured, "PATH", table)
    _measured.table.cache_clear()
    try:
        assert [row.compiled for row in _measured.table()] == [(), None, ("triton", "cuda")]
    finally:
        _measured.table.cache_clear()


def test_the_table_that_is_shipped_is_what_the_results_give(tmp_path):
    crossover.main(sorted((FOLDER / "results").glob("*.csv")), tmp_path / "crossover.csv")
    assert (tmp_path / "crossover.csv").read_text() == _measured.PATH.read_text()
