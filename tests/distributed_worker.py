"""Run by torchrun in two processes: trains every layer under DDP and FSDP2 beside a single process's training.

Writes what each layer did to `<folder>/results.json`, and the state of FSDP2's training to `<folder>/<layer>` with
torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import distributed_layers as table
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
Grads = dict[str, Tensor]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, task: Tensor) -> Grads:
    """The gradients of one step, whole, by their names without wrappers."""
    optimizer.zero_grad()
    table.loss(model, x, task).backward()
    grads = {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return grads


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, share: slice, first: int = 0) -> list[Grads]:
    """A step on this share of each batch."""
    batches = (table.batch(name, number) for number in range(first, first + STEPS))
    return [step(model, optimizer, x[share], task[share]) for x, task in batches]


@contextmanager
def reduced(model: nn.Module) -> Iterator[list[int]]:
    """How many numbers each collective that carries gradients is given."""
    sizes: list[int] = []
    if isinstance(model, DistributedDataParallel):

        def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sizes.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # which DDP reads
        model.register_comm_hook(None, hook)
        yield sizes
        return
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    scatter = getattr(dist, name)

    def count(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(input.numel())
        return scatter(output, input, *args, **kwargs)

    with mock.patch.object(dist, name, count):
        yield sizes


def sharded(model: table.Model) -> nn.Module:
    fully_shard(model.block)
    return fully_shard(model)


def data_parallel(model: table.Model) -> nn.Module:
    unused = isinstance(model.block.layer, table.layers.AdapterBank)  # whose third task no sample has
    return DistributedDataParallel(model, find_unused_parameters=unused)


def difference(got: list[Grads], wanted: list[Grads]) -> float:
    """The largest, relative to each gradient's largest element; the names must be the same."""
    assert len(got) == len(wanted) and all(g.keys() == w.keys() for g, w in zip(got, wanted)), "other gradients"
    pairs = [(g[name], w[name]) for g, w in zip(got, wanted) for name in w]
    assert all(w.abs().max() > 0 for _, w in pairs), "a gradient of zeros"
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in pairs)


def compare(name: str, wrap: Callable[[table.Model], nn.Module], share: slice, folder: Path) -> dict[str, Any]:
    """Two processes' gradients beside a single one's, what travelled, and what is left of the weights."""
    alone, model = table.make(name), wrap(table.make(name))
    wanted = train(name, alone, table.optimizer(alone), slice(None))
    optimizer = table.optimizer(model)
    with reduced(model) as sizes:
        got = train(name, model, optimizer, share)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    result: dict[str, Any] = {"difference": difference(got, wanted), "travelled": sum(sizes) / STEPS}
    result["gradients"] = list(got[0])
    if dist.get_rank() == 0:  # where alone a full state dict is
        state = alone.state_dict()
        assert full.keys() == state.keys()
        result["state"] = max((full[n] - state[n]).abs().max().item() for n in state if state[n].is_floating_point())
    if wrap is sharded:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / name)
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, half = dist.get_rank(), table.SAMPLES // dist.get_world_size()
    share = slice(rank * half, (rank + 1) * half)
    results: dict[str, dict[str, Any]] = {}
    for name in sys.argv[2:] or table.CASES:
        results[name] = {}
        for wrap in (data_parallel, sharded):
            try:
                results[name][wrap.__name__] = compare(name, wrap, share, folder)
            except Exception:  # of this layer; the others go on
                results[name][wrap.__name__] = {"error": traceback.format_exc()[-3000:]}
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()  # or the first to leave closes what the other may still read
    dist.destroy_process_group()
    # Of 90 starts on a busy machine 3 aborted ("terminate called") once all this was done, in what PyTorch tears down
    # when the interpreter ends. There is nothing left to tear down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
