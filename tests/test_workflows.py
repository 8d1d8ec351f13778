"""The workflows: valid by GitHub's schema, and true to what is in this tree."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def commands(path: Path) -> list[str]:
    return [step["run"] for job in load(path)["jobs"].values() for step in job.get("steps", []) if "run" in step]


def test_all_are_here():
    assert [path.stem for path in FILES] == ["ci", "gpu", "release", "wheels"]


def test_schema(tmp_path):
    """As SchemaStore has it, in the copy that check-jsonschema brings along; a broken workflow does not pass."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, FILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(FILES[0].read_text().replace("runs-on:", "runs-at:"))
    assert subprocess.run([*command, str(broken)], capture_output=True).returncode == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_make_knows_what_they_call(path):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    called = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(commands(path))))
    assert called <= targets, called - targets


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_jobs_need_what_is_there_and_end(path):
    jobs = load(path)["jobs"]
    for name, job in jobs.items():
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= jobs.keys(), name
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), name
        elif "make" in str(job["steps"]):
            assert job["timeout-minutes"] <= 120, name


def test_no_outside_code_on_our_own_machines():
    """A self-hosted runner takes no pull request of a fork."""
    for path in FILES:
        for job in load(path)["jobs"].values():
            if "self-hosted" in job.get("runs-on", ()):
                assert "head.repo.full_name == github.repository" in job["if"]


def matrix() -> list[tuple[str, str, str]]:
    """Every (os, python, torch) of the matrix."""
    chosen = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["matrix"]["strategy"]["matrix"]
    rows = list(itertools.product(chosen["os"], chosen["python"], chosen["torch"]))
    return rows + [(row["os"], row["python"], row["torch"]) for row in chosen["include"]]


def test_the_matrix_is_what_the_project_promises():
    rows = matrix()
    pythons, torches = {python for _, python, _ in rows}, {torch for *_, torch in rows}
    oldest_python = re.search(r'requires-python = ">=([\d.]+)"', PROJECT).group(1)
    oldest_torch = re.search(r'"torch>=([\d.]+)"', PROJECT).group(1)
    newest_torch = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert pythons == {f"3.{minor}" for minor in range(10, 14)} and oldest_python == "3.10"
    assert torches == {f"{oldest_torch}.*", f"{newest_torch}.*"}
    kinds = {re.sub(r"-[\d.]+", "", os) for os, *_ in rows}
    assert kinds == {"ubuntu", "ubuntu-arm", "macos"}
    wheels = re.search(r'^build = "(.*)"', PROJECT, re.MULTILINE).group(1).split()
    assert wheels == [f"cp{python.replace('.', '')}-*" for python in sorted(pythons, key=lambda p: int(p[2:]))]
