"""`make fuzz` in short: a few calls of every op, what it once found, and that it finds, shrinks, keeps and repeats."""

from __future__ import annotations

import shlex

import pytest
import torch
from fuzz import NAMES, Target, app, repeat
from fuzzing import Call, Step, strategy
from hypothesis import HealthCheck, Phase, given, settings
from typer.testing import CliRunner

from petl_kernels.ops.channel_scale import OP

# What was a bug, as `make fuzz` printed it.
FOUND: tuple[Call | Step, ...] = (
    # Torch's own error at the write into an expanded bias.
    Call("channel_linear", {"n": 0, "d": 16, "k": 0}, "float64", views={"bias": "expanded"}),
)


@pytest.mark.parametrize("drawn", FOUND, ids=repr)
def test_what_was_found_stays_mended(drawn):
    Target(drawn.case if isinstance(drawn, Call) else drawn.kind, drawn.impl).judge(drawn)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_calls(name):
    target = Target(name, "cpp")
    few = settings(
        max_examples=4,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    few(given(strategy(name, "cpp"))(target.judge))()
    assert target.calls > target.refused


def test_a_wrong_kernel_is_found_shrunk_kept_and_repeated(monkeypatch, tmp_path, capsys):
    direction, real = OP.directions["forward"], OP.module("cpp").forward

    def wrong(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = real(x, scale)
        if y.dim() > 1 and y.shape[-1] > 40:
            y[..., 40] *= 1.1
        return y

    monkeypatch.setitem(direction._callables, "cpp", wrong)
    monkeypatch.setattr("fuzz.CORPUS", tmp_path)
    first, again = Target("channel_scale", "cpp"), Target("channel_scale", "cpp")
    while first.broken is None and first.calls < 2000:
        first.round()
    assert isinstance(first.broken, Call) and 40 < first.broken.sample["d"] < 200
    assert not first.broken.views and first.broken.special is None  # which have nothing to do with it
    assert "output: error" in first.why
    again.round()  # begins with what failed
    assert again.broken == first.broken and again.calls < first.calls
    *_, code = shlex.split(repeat(first.broken))
    exec(code)
    assert "output: error" in capsys.readouterr().out
    monkeypatch.setitem(direction._callables, "cpp", real)
    exec(code)
    assert capsys.readouterr().out == "[]\n"


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("fuzz.CORPUS", tmp_path)
    result = CliRunner().invoke(app, ["--minutes", "0.005", "--op", "layer_norm"])
    assert result.exit_code == 0 and "layer_norm" in result.output
    assert CliRunner().invoke(app, ["--op", "nothing"]).exit_code == 2
