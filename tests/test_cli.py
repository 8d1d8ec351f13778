"""`petl-kernels env`: the facts, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import petl_kernels
from petl_kernels import env, nn
from petl_kernels.cli import app
from petl_kernels.cli.methods import as_markdown
from petl_kernels.methods import METHODS
from petl_kernels.ops._op import Op
from petl_kernels.testing import CASES


def run(*args):
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_json_is_the_report():
    facts = json.loads(run("env", "--json"))
    assert facts == json.loads(json.dumps(env.report()))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["petl_kernels"] == petl_kernels.__version__
    assert set(facts["ops"]) == set(Op.registry) > {case.name for case in CASES}
    for said in facts["built"].values():
        assert said["built"] or said["reason"]
    assert facts["cuda"]["devices"] or facts["cuda"]["reason"]


def test_every_implementation_is_accounted_for():
    for name, places in env.ops().items():
        for where, said in places.items():
            assert {said["chosen"], *said["others"]} == set(Op.registry[name].impls), where
            assert said["call"] and said["why"] and all(said["others"].values())


def test_the_table_says_the_same():
    text, facts = run("env"), env.report()
    for value in (*facts["versions"].values(), facts["cpu"]["model"], *env.VARIABLES, *env.SWAPPABLE):
        assert value is None or value in text
    for name, places in facts["ops"].items():
        said = places["cpu float32"]
        assert f"runs on {said['chosen']}: {said['why']}" in text and f"{name} {said['call']}, cpu float32" in text
        assert all(f"not {other}: {reason}" in text for other, reason in said["others"].items())


def test_the_environment_is_shown(monkeypatch):
    monkeypatch.setenv("PETL_KERNELS_IMPL", "reference")
    facts = env.report()
    assert facts["environment"]["PETL_KERNELS_IMPL"] == "reference"
    assert all(said["chosen"] == "reference" for op in facts["ops"].values() for said in op.values())
    monkeypatch.setenv("PETL_KERNELS_IMPL", "fast")
    facts = env.report()
    said = facts["ops"][CASES[0].name]["cpu float32"]
    assert said["chosen"] is None and "got 'fast'" in said["error"]
    assert "got 'fast'" in run("env")


def blocked(monkeypatch):
    monkeypatch.setitem(sys.modules, "petl_kernels._cpu", None)
    monkeypatch.delattr(petl_kernels, "_cpu", raising=False)
    monkeypatch.delitem(sys.modules, "petl_kernels.ops._native", raising=False)  # which holds on to it


def test_why_the_extension_is_missing(monkeypatch, tmp_path):
    """The build's own reason where it failed; the loader's where it did not; else that nothing was built."""
    blocked(monkeypatch)
    monkeypatch.setattr(env.resources, "files", lambda package: tmp_path)
    assert "no build was recorded" in env.report()["built"]["cpu"]["reason"]
    record = {"cpu": {"built": False, "reason": "no C++ compiler"}, "cuda": {"built": False, "reason": "no toolkit"}}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert env.report()["built"] == record
    assert "not built: no C++ compiler" in run("env") and "not built: no toolkit" in run("env")
    (tmp_path / "_build.json").write_text(json.dumps({"cpu": {"built": True, "reason": None}}))
    assert "_cpu" in env.report()["built"]["cpu"]["reason"]


def test_the_extension_tells_its_instruction_sets():
    built = env.report()["built"]["cpu"]
    if not built["built"]:
        pytest.skip(built["reason"])
    assert built["isa"] in built["isas"] and set(built["isas"]) <= set(built["built_isas"])
    assert f"active {built['isa']}" in run("env")


def test_python_dash_m():
    command = [sys.executable, "-m", "petl_kernels", "env", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["versions"]["torch"] == torch.__version__


def test_the_methods_of_the_readme_are_the_table():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert as_markdown() in readme, "copy the output of `petl-kernels methods --markdown` into README.md"
    assert as_markdown() in run("methods", "--markdown")


def test_methods():
    facts = json.loads(run("methods", "--json"))
    assert list(facts) == list(METHODS) and facts["lora"]["parameters"] == "4*a*d*r"
    assert all(facts[name]["place"] for name in METHODS)
    for name, method in METHODS.items():
        assert name in run("methods") and (method.module is None or hasattr(nn, method.module))
