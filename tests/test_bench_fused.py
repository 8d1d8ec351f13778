"""The benchmark of the libraries' modules before and after `fuse`."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from petl_kernels.benchmarking import timing

pytest.importorskip("adapters", exc_type=Exception)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fused

QUICK = ["--tokens", "8", "--width", "64", "--repeats", "1", "--no-compile", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fused, "ceilings", lambda dtype, device: timing.Ceilings(1e11, 1e10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*args):
    app = typer.Typer()
    app.command()(fused.main)
    return CliRunner().invoke(app, [*QUICK, *args])


def test_rows(tmp_path):
    path = tmp_path / "out.csv"
    result = bench("--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric_name"] == "speed"]
    providers = {}
    for row in rows:
        providers.setdefault(row["x_value"], set()).add(row["kernel_provider"])
    assert len(providers) == 7 and all(names == {"library", "fused"} for names in providers.values())


def test_a_wrong_module_is_not_timed(monkeypatch, tmp_path):
    site = next(site for site in fused.sites(64) if site.name == "adapters lora")

    def off(model, x):
        return site.call(model, x) * (1 if model is site.model else 1.01)

    monkeypatch.setattr(fused, "measure", lambda *a: pytest.fail("it was timed"))
    monkeypatch.setattr(fused, "sites", lambda d: [dataclasses.replace(site, call=off)])
    result = bench("--csv", str(tmp_path / "out.csv"))
    assert result.exit_code == 1 and "adapters lora float32: off by" in result.output
    assert not (tmp_path / "out.csv").exists()
