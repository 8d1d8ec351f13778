"""The accuracy benchmark: what is as accurate as eager passes, what is not is at its top and fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import typer
from table import demanded
from typer.testing import CliRunner

from petl_kernels.testing import CASES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accuracy


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench():
    app = typer.Typer()
    app.command()(accuracy.main)
    calls = ["--op", CASES[0].name, "--calls", "act-", "--dtype", "float32,bfloat16", "--seeds", "4", "--rows", "5"]
    return CliRunner().invoke(app, [*calls, "--impl", "cpp"])


@pytest.mark.skipif(not demanded("cpp"), reason="the C++ implementation is not demanded")
def test_accuracy(monkeypatch):
    good = bench()
    assert good.exit_code == 0 and "draws fail the rule" in good.output, good.output
    real = accuracy.run

    def off(fn, inputs, **options):
        scaled = {name: v * 1.001 if name == "w_up" and options["impl"] == "cpp" else v for name, v in inputs.items()}
        return real(fn, scaled, **options)

    monkeypatch.setattr(accuracy, "run", off)
    bad = bench()
    assert bad.exit_code == 1 and "float32" in bad.output, bad.output
