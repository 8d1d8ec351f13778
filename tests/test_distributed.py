"""Two processes train every layer under DDP and FSDP2 as one does, and one goes on where two stopped.

`distributed_worker.py` trains all layers in one start of torchrun.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_layers as table
import distributed_worker as worker
import pytest
import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from petl_kernels import nn

FOLDER = Path(__file__).parent
EXAMPLE = FOLDER.parent / "examples" / "distributed.py"
EXACT = 1e-12  # relative, in float64: what the order of the sums may change
BOTH = ("data_parallel", "sharded")


def torchrun(script: Path, *args: str, timeout: int = 240) -> str:
    """The output of a script that two processes ran."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one run, which the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            torchrun(FOLDER / "distributed_worker.py", str(folder))
    return folder


def result(trained: Path, layer: str, wrapper: str) -> dict[str, Any]:
    said = json.loads((trained / "results.json").read_text())[layer][wrapper]
    assert "error" not in said, said["error"]
    return said


def test_every_layer_is_here():
    layers = {name for name in nn.__all__ if inspect.isclass(getattr(nn, name))}
    assert {name.split(",")[0] for name in table.CASES} == layers


@pytest.mark.parametrize("wrapper", BOTH)
@pytest.mark.parametrize("layer", table.CASES)
def test_gradients_are_those_of_one_process(trained, layer, wrapper):
    said = result(trained, layer, wrapper)
    assert said["difference"] < EXACT and said["state"] < EXACT


@pytest.mark.parametrize("wrapper", BOTH)
@pytest.mark.parametrize("layer", table.CASES)
def test_only_what_trains_travels(trained, layer, wrapper):
    said, model, wanted = result(trained, layer, wrapper), table.make(layer), 0
    for name, parameter in model.named_parameters():
        if wrapper == "sharded" and name in said["gradients"]:
            wanted += -(-len(parameter) // 2) * 2 * parameter[0].numel()  # padded for two processes
        elif wrapper == "data_parallel" and parameter.requires_grad:  # those of absent tasks too
            wanted += parameter.numel()
    assert said["travelled"] == wanted
    compact = table.CASES[layer].gradient
    assert compact is None or compact == sum(p.numel() for p in table.trained(model.block))


@pytest.mark.parametrize("layer", table.CASES)
def test_one_process_goes_on_where_two_stopped(trained, layer):
    straight, resumed = table.make(layer), table.make(layer)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    optimizers = [table.optimizer(model) for model in (straight, resumed)]
    worker.train(layer, straight, optimizers[0], slice(None))
    states = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizers[1])))
    # A task that no sample had has no state in the optimizer, and in the checkpoint none.
    dcp.load(states, checkpoint_id=trained / layer, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(resumed, optimizers[1], model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    pairs = [
        worker.train(layer, model, optimizer, slice(None), first=worker.STEPS)
        for model, optimizer in zip((resumed, straight), optimizers[::-1])
    ]
    assert worker.difference(*pairs) < EXACT


@pytest.mark.distributed  # it leaves as a program does, where PyTorch aborts now and then: see distributed_worker.py
def test_the_example_goes_on_alone(request, tmp_path):
    for library in ("adapters", "matplotlib", "transformers"):
        pytest.importorskip(library, exc_type=Exception)
    model_folder = request.getfixturevalue("model_folder")
    import typer
    from typer.testing import CliRunner

    import distributed as example

    small = ["--model", str(model_folder), "--batch", "8", "--lr", "0.01"]
    saved = str(tmp_path / "checkpoint")
    said = torchrun(EXAMPLE, *small, "--steps", "30", "--shard", "--save", saved)
    assert said.startswith("2 processes, FSDP2: 4 modules fused, 0 not") and "in 30 steps" in said
    app = typer.Typer()
    app.command()(example.main)
    done = CliRunner().invoke(app, [*small, "--steps", "1", "--resume", saved])
    assert done.exit_code == 0 and done.output.startswith("alone: 4 modules fused"), done.output
    first, last = (float(text.split("loss ")[1].split()[0]) for text in (said, done.output))
    assert last < first
