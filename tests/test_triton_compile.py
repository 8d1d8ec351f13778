"""What every launch setting of every Triton kernel takes when it is compiled for a GPU, without one.

sm_90 is part of `make test`; all four targets are `make resources`, a job of its own in CI, six minutes of processor
time. So are calls that an op names in `others`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import petl_kernels  # noqa: F401  (registers every op)
from petl_kernels.ops._op import Op

pytest.importorskip("triton")

HERE = Path(__file__).parent

# Shared memory of a program, in bytes: sm_80 163 KiB, sm_90 and sm_100 227 KiB, gfx942 64 KiB.
TARGETS = {("cuda", "80"): 163, ("cuda", "90"): 227, ("cuda", "100"): 227, ("hip", "gfx942"): 64}
ALWAYS = [("cuda", "90")]


OPS = sorted(path.stem for path in (HERE / "triton_calls").glob("[a-z]*.py"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, id=t[1], marks=[] if t in ALWAYS else pytest.mark.resources) for t in TARGETS],
)
def test_every_launch_setting_compiles_without_spills(op, target, tmp_path):
    check(op, target, "some" if target in ALWAYS else "every", tmp_path)


@pytest.mark.resources
@pytest.mark.parametrize("op", [op for op in OPS if hasattr(importlib.import_module(f"triton_calls.{op}"), "others")])
@pytest.mark.parametrize("target", ALWAYS, ids=lambda target: target[1])
def test_the_settings_that_take_long_to_compile(op, target, tmp_path):
    check(op, target, "every", tmp_path)


def check(op, target, which, tmp_path):
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    command = [sys.executable, str(HERE / "triton_compile.py"), op, *target, which]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({kernel["kernel"] for kernel in compiled}) == importlib.import_module(f"triton_calls.{op}").KERNELS
    wrong = [k for k in compiled if k["spilled"] > 0 or k["shared"] > TARGETS[target] * 1024 or not k["registers"] > 0]
    assert not wrong, wrong


def test_every_op_with_triton_kernels_is_compiled():
    assert sorted(name for name, op in Op.registry.items() if "triton" in op.impls) == OPS
