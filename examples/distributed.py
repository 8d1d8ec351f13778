"""Fine-tune a pretrained MiniLM with fused Houlsby adapters on several processes: DDP, or FSDP2 with --shard.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py --steps 20
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --steps 20 --shard --save out/checkpoint
    python examples/distributed.py --steps 20 --resume out/checkpoint   # goes on with one process, or any number

Model and data: see sentiment.py. Each process takes its share of every batch, so that the losses are those of one
process up to rounding and dropout. Gradients of adapters and head travel; with --shard, the frozen weights as well.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from finetune import HELD_OUT, with_adapters
from petl_kernels import fuse
from sentiment import DATA, Classifier, load, read_sentences, split, tokenize, training_batches

Optimizer = torch.optim.Optimizer


def start() -> torch.device:
    """Join the processes that torchrun started, if it did; the device of this one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device is None else "nccl")
    if device is not None:
        torch.cuda.set_device(device)
    return device or torch.device("cpu")


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: Classifier, shard: bool) -> nn.Module:
    """The model as every process trains it."""
    if not dist.is_initialized():
        return model
    if not shard:
        return DistributedDataParallel(model)
    for layer in model.encoder.encoder.layer:  # type: ignore[union-attr, operator]
        fully_shard(layer)
    fully_shard(model)
    return model


def share(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """This process's rows of a batch."""
    rank, size = rank_and_size()
    return {name: rows.tensor_split(size)[rank].to(device) for name, rows in batch.items()}


def train(
    model: nn.Module, optimizer: Optimizer, batches: list[dict[str, Tensor]], device: torch.device
) -> list[float]:
    """A step per batch; the losses, averaged over the processes."""
    model.train()
    losses = []
    for batch in batches:
        loss, _ = model(**share(batch, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / rank_and_size()[1]
        if dist.is_initialized():
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What trains, and the optimizer's state: a checkpoint without the backbone, whatever the number of processes."""
    options = StateDictOptions(ignore_frozen_params=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))


def resume(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Take up what `state` gave, in whatever number of processes that was."""
    saved = state(model, optimizer)
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(strict=False),
    )


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Sentences per step, of all processes together.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of initialization, batches and dropout.")] = 0,
    shard: Annotated[bool, typer.Option(help="FSDP2 instead of DDP.")] = False,
    save: Annotated[Path | None, typer.Option(help="Folder for a checkpoint of what trains.")] = None,
    resumed: Annotated[Path | None, typer.Option("--resume", exists=True, help="Such a folder to go on from.")] = None,
    model: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with a BERT model, instead of the packaged one.")
    ] = None,
) -> None:
    """Fine-tune on every process that torchrun started."""
    logging.getLogger("adapters.model_mixin").setLevel(logging.ERROR)
    device = start()
    rank, size = rank_and_size()
    tokenizer, encoder = load(model)
    sentences = tokenize(tokenizer, split(read_sentences(DATA), HELD_OUT)[0])
    classifier = with_adapters(encoder, seed).to(device)
    report = fuse(classifier)
    wrapped = wrap(classifier, shard)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    if resumed is not None:
        resume(wrapped, optimizer, resumed)
    torch.manual_seed(seed + rank)  # dropout
    began = time.perf_counter()
    losses = train(wrapped, optimizer, list(training_batches(sentences, batch, steps, seed)), device)
    seconds = time.perf_counter() - began
    if save is not None:
        dcp.save(state(wrapped, optimizer), checkpoint_id=save)
    if rank == 0:
        how = "alone" if size == 1 else f"{size} processes, {'FSDP2' if shard else 'DDP'}"
        tail = losses[-max(1, steps // 10) :]
        trained = sum(p.numel() for p in parameters)
        loss = f"loss {losses[0]:.4f} to {sum(tail) / len(tail):.4f} in {steps} steps"
        speed = f"{1e3 * seconds / steps:.0f} ms each"
        Console(width=160).print(f"{how}: {report.summary}; {trained:,} parameters train; {loss}, {speed}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
