"""The optimizer benchmark: it times what is right and refuses what is wrong."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from petl_kernels.benchmarking import timing
from petl_kernels.benchmarking.report import COLUMNS
from petl_kernels.ops.channel_adamw import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import optimizer

QUICK = ["--layers", "1", "--width", "16", "--repeats", "3", "--impl", "reference"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(optimizer, "ceilings", lambda dtype, device: timing.Ceilings(1e11, 1e10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*args):
    app = typer.Typer()
    app.command()(optimizer.main)
    return CliRunner().invoke(app, [*QUICK, *args])


def test_rows(tmp_path):
    path = tmp_path / "out.csv"
    result = bench("--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert len({row["kernel_provider"] for row in rows}) == 7
    memory = {
        (r["kernel_provider"], json.loads(r["extra_benchmark_config_str"])["dtype"]): float(r["y_value_50"])
        for r in rows
        if r["metric_name"] == "memory"
    }
    matrices, elements = 6, 4 * 16 * 16 + 2 * 64 * 16
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for provider, share in (("AdamW fused, dense", 1), ("ChannelAdamW, rows", 8), ("ChannelAdamW, columns", 8)):
            held = 2 * size * elements / share + 4 * matrices  # two moments and a counter each
            assert memory[provider, dtype] == pytest.approx(held / 2**20, rel=1e-4)


def test_a_wrong_update_is_not_timed(monkeypatch, tmp_path):
    right = reference.update

    def broken(params, grads, exp_avgs, exp_avg_sqs, steps, channels, *rest):
        right(params, grads, exp_avgs, exp_avg_sqs, steps, [None if c is None else c.flip(0) for c in channels], *rest)
        params[0].flatten()[0].add_(1)

    monkeypatch.setitem(optimizer.ChannelAdamW._op.directions["update"]._callables, "reference", broken)
    monkeypatch.setattr(optimizer, "measure", lambda *a: pytest.fail("it was timed"))
    result = bench("--csv", str(tmp_path / "out.csv"))
    assert result.exit_code == 1 and "nothing is timed" in result.output
    assert not (tmp_path / "out.csv").exists()


def test_bad_options():
    result = bench("--dtype", "int8")
    assert result.exit_code == 2 and "--dtype must be some of" in " ".join(result.output.replace("│", "").split())
