"""Fine-tune a pretrained MiniLM with Houlsby adapters on movie-review sentences, once eager and once fused.

    python examples/finetune.py               # some minutes on two CPU cores
    python examples/finetune.py --steps 5     # smoke run

Model and data: see sentiment.py. Both runs start from the same weights and see the same batches and the same dropout
masks, so their losses may differ by rounding only.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import training
from petl_kernels.integrations import FuseReport, fuse
from petl_kernels.profiling import count_launches, module_time, saved_bytes
from sentiment import (
    DATA,
    Classifier,
    evaluation_batches,
    load,
    read_sentences,
    split,
    tokenize,
    training_batches,
)

matplotlib.use("Agg")

HELD_OUT = 1000  # sentences; one point of accuracy is ten of them
REDUCTION = 8  # d = 384, r = 48
DEFAULT_STEPS = 157
PROBES = 11
SITE_METHOD = "bottleneck_layer_forward"
WANTED_ACCURACY = 0.80


@dataclass
class Result:
    """What one of the two runs measured; see the table for the units."""

    losses: list[float]
    accuracy: float
    training_seconds: float
    tokens_per_second: float = 0.0
    step_ms: float = 0.0
    adapter_share: float = 0.0
    saved_mib: float = 0.0
    launches: int = 0


def sites(model: nn.Module) -> list[nn.Module]:
    """The places with an adapter, each computing adapter, residual and layer norm."""
    from adapters.methods.bottleneck import BottleneckLayer

    return [m for m in model.modules() if isinstance(m, BottleneckLayer)]


def with_adapters(encoder: Any, seed: int, reduction: int = REDUCTION) -> Classifier:
    """Freeze the encoder and put a trainable Houlsby adapter after each attention and each feed-forward block."""
    import adapters

    torch.manual_seed(seed)
    adapters.init(encoder)
    encoder.add_adapter("movies", config=adapters.DoubleSeqBnConfig(reduction_factor=reduction))
    encoder.train_adapter("movies")
    return Classifier(encoder, encoder.config.hidden_size)


def train(model: Classifier, batches: list[dict[str, Tensor]], lr: float, seed: int, advance: Any) -> list[float]:
    """AdamW on adapters and head; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return training.train(model, batches, optimizer, seed, advance)


def measure(models: dict[str, Classifier], results: dict[str, Result], batches: list[dict[str, Tensor]]) -> None:
    """Speed, adapter share, saved bytes and launches of forward + backward, with one step of each model in turn.

    So neither model gets the quieter moments of the machine; medians over the batches.
    """

    def step(model: Classifier, batch: dict[str, Tensor]) -> None:
        model(**batch)[0].backward()
        model.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    shares: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.train()
        step(model, batches[0])
    for batch in batches:
        for name, model in models.items():
            start = time.perf_counter()
            step(model, batch)
            seconds[name].append((time.perf_counter() - start) / int(batch["attention_mask"].sum()))
            shares[name].append(module_time(sites(model), partial(step, model, batch), SITE_METHOD).share)
    tokens = statistics.mean(int(batch["attention_mask"].sum()) for batch in batches)
    for name, model in models.items():
        result, per_token = results[name], statistics.median(seconds[name])
        result.tokens_per_second, result.step_ms = 1 / per_token, 1e3 * per_token * tokens
        result.adapter_share = statistics.median(shares[name])
        result.saved_mib = saved_bytes(partial(model, **batches[0]), exclude=model.parameters()) / 2**20
        result.launches = count_launches(partial(step, model, batches[0])).total()


def table(results: dict[str, Result]) -> Table:
    """The two runs side by side."""
    rows = Table("", *results, title="MiniLM-L6, Houlsby adapters (r = 48), movie-review sentences")
    figures = [
        ("training loss, last tenth of the steps", lambda r: f"{statistics.mean(_last_tenth(r.losses)):.4f}"),
        ("held-out accuracy", lambda r: f"{r.accuracy:.1%}"),
        ("tokens/s, forward + backward", lambda r: f"{r.tokens_per_second:,.0f}"),
        ("ms per step", lambda r: f"{r.step_ms:.1f}"),
        ("adapter sites' share of the step", lambda r: f"{r.adapter_share:.1%}"),
        ("saved activations, MiB", lambda r: f"{r.saved_mib:.1f}"),
        ("launches per step", lambda r: f"{r.launches:,}"),
    ]
    for name, figure in figures:
        rows.add_row(name, *map(figure, results.values()))
    return rows


def _last_tenth(losses: list[float]) -> list[float]:
    return losses[-max(1, len(losses) // 10) :]


def plot(results: dict[str, Result], path: Path) -> None:
    """The loss of every step, one over the other."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, result), style in zip(results.items(), ("-", "--")):
        axes.plot(result.losses, style, label=f"{name}, held-out accuracy {result.accuracy:.1%}")
    axes.set(xlabel="step", ylabel="training loss", title="MiniLM-L6 with Houlsby adapters")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def verdict(results: dict[str, Result], report: FuseReport, steps: int) -> list[str]:
    """What is wrong with the outcome; empty when nothing is."""
    eager, fused = results["eager"].accuracy, results["fused"].accuracy
    wrong = []
    if not report.fused:
        wrong.append(f"nothing was fused: {report}")
    if abs(eager - fused) > 0.01 + 1e-9:
        wrong.append(f"fused and eager differ by more than a point: {fused:.1%} and {eager:.1%}")
    if steps >= DEFAULT_STEPS and min(eager, fused) < WANTED_ACCURACY:
        wrong.append(f"{steps} steps reached {min(eager, fused):.1%} only, less than {WANTED_ACCURACY:.0%}")
    return wrong


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each of the two runs.")] = DEFAULT_STEPS,
    batch: Annotated[int, typer.Option(min=1, help="Sentences per step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of initialization, batches and dropout; the split is fixed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for finetune.png and finetune.json.")] = Path("out"),
    model: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with a BERT model, instead of the packaged one.")
    ] = None,
) -> None:
    """Fine-tune eager and fused, compare, and fail if they differ."""
    console, errors = Console(), Console(stderr=True)
    # The library tries a new adapter out before it activates it, and warns that none is active.
    logging.getLogger("adapters.model_mixin").setLevel(logging.ERROR)
    tokenizer, encoder = load(model)
    sentences, held_out = (tokenize(tokenizer, part) for part in split(read_sentences(DATA), HELD_OUT))
    eager = with_adapters(encoder, seed)
    models = {"eager": eager, "fused": copy.deepcopy(eager)}
    report = fuse(models["fused"])
    console.print(f"{len(sentences)} training sentences, {HELD_OUT} held out. Fused model: {report.summary}.")

    batches = list(training_batches(sentences, batch, steps, seed))
    results = {}
    with Progress(console=errors, transient=True) as progress:
        for name, each in models.items():
            task = progress.add_task(name, total=steps)
            start = time.perf_counter()
            losses = train(each, batches, lr, seed, lambda task=task: progress.advance(task))
            seconds = time.perf_counter() - start
            results[name] = Result(losses, training.accuracy(each, evaluation_batches(held_out)), seconds)
        measure(models, results, batches[:PROBES])

    out.mkdir(parents=True, exist_ok=True)
    plot(results, out / "finetune.png")
    settings = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "held_out": HELD_OUT,
        "torch": torch.__version__,
    }
    record = {**settings, "fused_modules": report.fused, "runs": {name: asdict(r) for name, r in results.items()}}
    (out / "finetune.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(table(results))
    console.print(f"Loss curves: {out / 'finetune.png'}; all figures: {out / 'finetune.json'}")
    wrong = verdict(results, report, steps)
    for line in wrong:
        errors.print(f"finetune: {line}", style="red")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
