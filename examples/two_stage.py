"""Few channels against everything else: six ways to fit one pretrained model to several tasks, and tasks that swap.

    python examples/two_stage.py                # a pretrained MiniLM on four domains of sentiment
    python examples/two_stage.py --vision       # a small ViT, pretrained here on the digits 0-4, on the digits 5-9
    python examples/two_stage.py --steps 4      # smoke run
    python examples/two_stage.py --tune         # the validation runs that the learning rates below come from

Head only, LayerNorm, SCT (arXiv:2309.08513), two-stage (after TTC-Tuning, arXiv:2303.07910), Houlsby adapters
(arXiv:1902.00751) and full fine-tuning: the same weights, batches, number of steps and schedule, AdamW for all.
Prints a table; writes out/two_stage.png and .json (or two_stage_vision) and a file per task.

What is public of TTC-Tuning is its paradigm: tune the layer norms, choose channels by a Taylor expansion of the loss,
tune only those. Score, number and placement of the channels are therefore our choices, and so are the columns of the
linears as what is tuned (`petl_kernels.nn.ChannelLinear`), the layer norms that go on training, and 3 of 10 steps for
stage 1. SCT follows its authors' code: K = d/8, channels by L2 norm, a K x K linear per block on the residual stream
right after attention. In the pre-LN ViT that is after `x + attention(norm1(x))`, before norm2. BERT is post-LN: there
the stream that the feed-forward part reads and is added to is the output of the attention's layer norm, so the module
stands behind that; this mapping is ours, and so is scoring all tokens of a sentence (their mean is classified), where
SCT leaves out the class token.

Four two-stage tasks then swap on one frozen MiniLM, bit for bit: see `swap`.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import sentiment
import vision
from comparison import Rates, Results, compare, plot, table, verdict
from methods import CHOICES, METHODS, Backbone, Fitted, Problem, fit
from petl_kernels import two_stage
from training import Batch, accuracy

MINILM = Backbone(
    linears=("encoder.encoder.layer.*.attention.self.[qkv]*", "encoder.encoder.layer.*.dense"),
    branches=("encoder.encoder.layer.*.output.dropout",),
    stream="encoder.encoder.layer.*.attention.output.LayerNorm",
    mask=lambda batch: batch["attention_mask"].bool(),
)
VIT = Backbone(
    linears=("blocks.*.qkv", "blocks.*.proj", "blocks.*.fc*"),
    branches=("blocks.*.branch*",),
    stream="blocks.*.stream",
    skip_tokens=1,
)
BATCH = 32
SCORING = 16  # batches by which channels are chosen
TEXT_STEPS, VISION_STEPS = 100, 200
HELD_OUT, VALIDATION = 1000, 500  # sentences of a domain
DIGITS, VALIDATION_DIGITS = 200, 100  # images to train on and to validate with; the others, 596, are held out
PRETRAINING = 3  # steps for each step of the transfer
SEEDS = 3  # of --vision: pretraining, split and batches each

# Peak learning rates, of each stage where there are two; the head's is the same for all methods. Chosen by accuracy on
# validation examples that are cut from the training part, not on the held-out ones: those of the text on the amazon
# domain alone, those of the digits on two seeds. `--tune` varies them on all tasks.
TEXT_RATES: Rates = {
    "head only": (1e-2,),
    "LayerNorm": (1e-2,),
    "SCT": (3e-3,),
    "two-stage": (1e-2, 1e-3),
    "Houlsby": (1e-3,),
    "full": (1e-4,),
}
TEXT_HEAD_RATE = 1e-2
VISION_RATES: Rates = {
    "head only": (3e-2,),
    "LayerNorm": (3e-2,),
    "SCT": (1e-2,),
    "two-stage": (3e-2, 1e-2),
    "Houlsby": (1e-2,),
    "full": (3e-3,),
}
VISION_HEAD_RATE = 3e-2
FACTORS = (1 / 3, 1, 3)  # by which --tune varies a rate


def text_problems(steps: int, seed: int, model: Path | None, validation: bool) -> Iterator[Problem]:
    """The four domains, on one pretrained MiniLM with a fresh head."""
    tokenizer, encoder = sentiment.load(model)
    torch.manual_seed(seed)
    classifier = sentiment.Classifier(encoder, encoder.config.hidden_size)
    for domain in sentiment.DOMAINS:
        training, held_out = sentiment.split(sentiment.read_sentences(sentiment.DATA, domain), HELD_OUT)
        if validation:
            training, held_out = sentiment.split(training, VALIDATION)
        examples, others = (sentiment.tokenize(tokenizer, part) for part in (training, held_out))
        batches = list(sentiment.training_batches(examples, BATCH, steps, seed))
        judged = sentiment.evaluation_batches(others[: BATCH * steps])  # in a smoke run not all
        yield Problem(domain, classifier, MINILM, batches, batches[:SCORING], judged)


def vision_problems(steps: int, seed: int, count: int, validation: bool) -> Iterator[Problem]:
    """The digits 5 to 9, on a ViT pretrained on the digits 0 to 4, for several seeds."""
    for each in range(seed, seed + count):
        model = vision.pretrained(PRETRAINING * steps, each)
        model.head.reset_parameters()  # for other digits
        parts = [DIGITS, VALIDATION_DIGITS]
        images, labels = vision.digits(5, each)
        parts.append(len(labels) - sum(parts))
        training, for_validation, held_out = zip(images.split(parts), labels.split(parts))
        batches = vision.batches(training, BATCH, steps, each)
        judged = vision.whole(for_validation if validation else held_out)
        yield Problem(f"seed {each}", model, VIT, batches, [vision.whole(training)], [judged])


def tune(problems: list[Problem], rates: Rates, head_rate: float, seed: int, console: Console) -> None:
    """Validation accuracy of each method around its rates: what they were chosen by."""
    rows = Table("method", "factor", *(problem.name for problem in problems), "mean", title="Validation accuracy")
    for (name, stages), factor in itertools.product(METHODS.items(), FACTORS):
        reached = []
        for problem in problems:
            fitted = Fitted(copy.deepcopy(problem.model))
            scaled = (*rates[name][:-1], rates[name][-1] * factor)
            head = head_rate * factor if name == "head only" else head_rate
            fit(fitted, stages, problem, scaled, head, seed, lambda: None)
            reached.append(accuracy(fitted.model, problem.held_out))
        rows.add_row(name, f"{factor:.2f}", *(f"{a:.1%}" for a in reached), f"{sum(reached) / len(reached):.1%}")
    console.print(rows)


def majority(batches: list[Batch]) -> float:
    """The part of the examples that the most frequent label has."""
    counts = torch.cat([batch["labels"] for batch in batches]).bincount()
    return int(counts.max()) / int(counts.sum())


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """In evaluation mode."""
    return model.eval()(**batch)[1]


def swap(backbone: nn.Module, files: dict[str, Path], fresh: dict[str, Tensor], batch: Batch) -> list[str]:
    """Put one task after the other onto the same backbone and take it off again; what is not as it has to be.

    Args:
        backbone: the pretrained model with the head that every task started from.
        files: the saved tasks.
        fresh: task -> logits of the batch by the model as it was trained.
        batch: any.
    """
    before, wrong = logits(backbone, batch), []
    for task, path in files.items():
        with two_stage.apply_task(backbone, path):
            swapped = logits(backbone, batch)
        if not torch.equal(swapped, fresh[task]):
            wrong.append(f"{task}: the logits are not those of the trained model, bit for bit")
        if torch.equal(swapped, before):
            wrong.append(f"{task}: the task file changes nothing")
        if not torch.equal(logits(backbone, batch), before):
            wrong.append(f"{task}: the backbone's logits are not restored, bit for bit")
    return wrong


def run(
    problems: Iterator[Problem], rates: Rates, head_rate: float, seed: int, folder: Path, errors: Console
) -> tuple[Results, list[str], dict[str, float]]:
    """Compare the methods on every task, then swap the two-stage tasks.

    Returns:
        The results, what is wrong with the swap, and the larger class's share of each task's held-out examples.
    """
    results: Results = {}
    larger: dict[str, float] = {}
    groups: dict[int, tuple[nn.Module, dict[str, Path], dict[str, Tensor], Batch]] = {}
    with Progress(console=errors, transient=True) as progress:
        for problem in problems:
            bar = progress.add_task(problem.name, total=len(METHODS) * len(problem.batches))

            def advance(method: str, bar: Any = bar, name: str = problem.name) -> None:
                progress.update(bar, advance=1, description=f"{name}, {method}")

            larger[problem.name] = majority(problem.held_out)
            results[problem.name], fits = compare(problem, rates, head_rate, seed, folder, advance)
            # Tasks on one backbone swap with each other; in --vision every seed has a backbone of its own.
            _, files, fresh, batch = groups.setdefault(id(problem.model), (problem.model, {}, {}, problem.held_out[0]))
            files[problem.name] = folder / f"{problem.name} two-stage.safetensors".replace(" ", "-")
            fresh[problem.name] = logits(fits["two-stage"].model, batch)
            del fits  # six models, before the next six
    wrong = [sentence for group in groups.values() for sentence in swap(*group)]
    return results, wrong, larger


def report(results: Results, larger: dict[str, float], wrong: list[str], console: Console) -> None:
    """What the table does not say."""
    sizes = ", ".join(f"{task} {methods['two-stage'].file_bytes / 2**10:,.1f} KiB" for task, methods in results.items())
    shares = ", ".join(f"{share:.1%} ({task})" for task, share in larger.items())
    notes = [
        f"Always guessing the larger class would be right for {shares}.",
        """Costs are means over the tasks. Two-stage: step and activations of the second stage (the first is
        LayerNorm's), the larger optimizer state of the two.""",
        CHOICES,
        "Learning rates were chosen on validation examples, not on the held-out ones.",
    ]
    if not wrong:
        notes.append(
            f"""Swap: the two-stage files ({sizes}) went onto their frozen backbone one after the other. Logits
            bit-identical to each trained model's and, when removed, to the backbone's before."""
        )
    for note in notes:
        console.print(" ".join(note.split()))


def main(
    steps: Annotated[int | None, typer.Option(min=2, help="Training steps of each method; 100 by default.")] = None,
    on_digits: Annotated[bool, typer.Option("--vision", help="A small ViT on digits instead of MiniLM.")] = False,
    seed: Annotated[int, typer.Option(help="Of heads, modules, batches and dropout; the text's split is fixed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path("out"),
    model: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with a BERT model, instead of the packaged one.")
    ] = None,
    validate: Annotated[bool, typer.Option("--tune", help="Vary the learning rates, on validation examples.")] = False,
) -> None:
    """Compare six methods of fine-tuning, swap tasks, and fail if something is wrong."""
    console, errors = Console(), Console(stderr=True)
    console.width = max(console.width, 100)  # of the table, also where there is no terminal
    default = VISION_STEPS if on_digits else TEXT_STEPS
    count = steps or default
    if on_digits:
        name, title = "two_stage_vision", "ViT pretrained on the digits 0-4, transferred to 5-9"
        rates, head_rate = VISION_RATES, VISION_HEAD_RATE
        problems = vision_problems(count, seed, SEEDS, validate)
    else:
        name, title = "two_stage", "MiniLM-L6 on four domains of sentiment"
        rates, head_rate = TEXT_RATES, TEXT_HEAD_RATE
        problems = text_problems(count, seed, model, validate)
    if validate:
        tune(list(problems), rates, head_rate, seed, console)
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results, wrong, larger = run(problems, rates, head_rate, seed, Path(folder), errors)
    if on_digits:
        panels = {f"mean and range over {SEEDS} seeds": list(results.values())}
    else:
        panels = {task: [methods] for task, methods in results.items()}
    plot(panels, title, out / f"{name}.png")
    settings = {"steps": count, "batch": BATCH, "seed": seed, "head_rate": head_rate, "rates": rates}
    record = {
        **settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "choices": " ".join(CHOICES.split()),
        "runs": {task: {each: asdict(r) for each, r in methods.items()} for task, methods in results.items()},
        "larger_class": larger,
        "swap": wrong or "bit-identical",
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(table(results, title))
    report(results, larger, wrong, console)
    console.print(f"Plot: {out / name}.png; all figures: {out / name}.json")
    wrong += verdict(results, judge_accuracy=count >= default)
    for line in wrong:
        errors.print(f"two_stage: {line}", style="red")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
