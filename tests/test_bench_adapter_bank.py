"""The benchmark of the bank: it times what agrees with the loop over tasks and refuses what does not."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from petl_kernels.benchmarking import timing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import adapter_bank


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(adapter_bank, "ceilings", lambda dtype, device: timing.Ceilings(1e11, 1e10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(path):
    app = typer.Typer()
    app.command()(adapter_bank.main)
    sizes = ["--samples", "6", "--tokens", "2", "--width", "32", "--bottleneck", "4", "--tasks", "3", "--repeats", "3"]
    return CliRunner().invoke(app, [*sizes, "--csv", str(path)])


def test_rows(tmp_path):
    result = bench(tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    with (tmp_path / "out.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric_name"] == "speed"]
    assert len(rows) == 6 and all(float(row["y_value_50"]) > 0 for row in rows)
    assert {row["kernel_provider"] for row in rows} == {"one adapter", "loop", "petl_kernels"}


def test_a_wrong_bank_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter_bank, "loop", lambda bank, x, task: bank(x, task) * 1.1)
    monkeypatch.setattr(adapter_bank, "interleave", lambda *a: pytest.fail("it was timed"))
    result = bench(tmp_path / "out.csv")
    assert result.exit_code == 1 and "nothing is timed" in result.output and not (tmp_path / "out.csv").exists()
