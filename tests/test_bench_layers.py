"""The benchmark of methods beside their libraries' modules: it times what agrees and refuses what does not."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from petl_kernels.benchmarking import timing
from petl_kernels.benchmarking.report import COLUMNS
from petl_kernels.nn import LoRALinear

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import layers

QUICK = ["--tokens", "8", "--width", "96", "--repeats", "3", "--no-compile"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(layers, "ceilings", lambda dtype, device: timing.Ceilings(1e11, 1e10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*args):
    app = typer.Typer()
    app.command()(layers.main)
    return CliRunner().invoke(app, [*QUICK, *args])


def test_rows(tmp_path):
    path = tmp_path / "out.csv"
    result = bench("--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric_name"] == "speed"]
    assert list(rows[0]) == COLUMNS and all(float(row["y_value_50"]) > 0 for row in rows)
    providers = {}
    for row in rows:
        providers.setdefault(row["x_value"], set()).add(row["kernel_provider"])
    assert len(providers) == 7
    for label, names in providers.items():
        assert names == {"library", "petl_kernels"} | ({"fused"} if label in ("lora 8", "lora 64") else set()), label


def test_a_wrong_layer_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(LoRALinear, "scale", property(lambda self: 2.0))
    monkeypatch.setattr(layers, "measure", lambda *a: pytest.fail("it was timed"))
    result = bench("--csv", str(tmp_path / "out.csv"))
    assert result.exit_code == 1 and "nothing is timed" in result.output and "lora 8 float32: off by" in result.output
    assert not (tmp_path / "out.csv").exists()


def test_bad_options():
    result = bench("--dtype", "int8")
    assert result.exit_code == 2 and "--dtype must be some of" in " ".join(result.output.replace("│", "").split())
