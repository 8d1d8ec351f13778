"""Fit a task by every method, measure what each costs, and show it: table, plot, and what is wrong with the outcome."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.table import Table

from methods import METHODS, Fitted, Problem, fit, save
from petl_kernels.profiling import saved_bytes
from training import Batch, accuracy

matplotlib.use("Agg")

PROBES = 7  # batches on which steps are timed
ALLOWED_LOSS = 0.05  # of accuracy against training the head alone
MARKERS = dict(zip(METHODS, "osD*^v"))

Rates = dict[str, tuple[float, ...]]  # method -> the peak learning rate of each of its stages


@dataclass
class Result:
    """What one method reached on one task, and at what cost.

    Attributes:
        accuracy: on the held-out examples, 0 to 1.
        parameters, without_head: how many trained in any stage.
        file_bytes: size of what has to be kept for the task.
        step_ms: median time of a training step, of the last stage.
        optimizer_bytes: the largest state of the optimizer.
        saved_bytes: activations kept for the backward pass of a step, in the last stage.
        losses: of every training step.
    """

    accuracy: float
    parameters: int
    without_head: int
    file_bytes: int
    optimizer_bytes: int
    losses: list[float]
    step_ms: float = 0.0
    saved_bytes: int = 0


Results = dict[str, dict[str, Result]]  # task -> method -> result


def compare(
    problem: Problem, rates: Rates, head_rate: float, seed: int, folder: Path, advance: Callable[[str], Any]
) -> tuple[dict[str, Result], dict[str, Fitted]]:
    """Fit the task by every method from the same weights, on the same batches, and measure."""
    fits, results = {}, {}
    for name, stages in METHODS.items():
        fitted = fits[name] = Fitted(copy.deepcopy(problem.model))
        fit(fitted, stages, problem, rates[name], head_rate, seed, partial(advance, name))
        results[name] = Result(
            accuracy(fitted.model, problem.held_out),
            fitted.parameters(head=True),
            fitted.parameters(head=False),
            save(folder / f"{problem.name} {name}.safetensors".replace(" ", "-"), fitted, problem),
            fitted.optimizer_bytes,
            fitted.losses,
        )
    measure(fits, results, problem.batches[:PROBES])
    return results, fits


def measure(fits: dict[str, Fitted], results: dict[str, Result], batches: list[Batch]) -> None:
    """Time of a step and saved activations, with one step of each method in turn, so none gets the quieter moments.

    At a learning rate of 0: the models stay as they are.
    """
    for fitted in fits.values():
        fitted.model.train()
        for group in fitted.optimizer.param_groups:
            group["lr"] = 0.0
        _step(fitted, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for batch, name in itertools.product(batches, fits):
        start = time.perf_counter()
        _step(fits[name], batch)
        seconds[name].append(time.perf_counter() - start)
    for name, fitted in fits.items():
        model = fitted.model
        results[name].step_ms = 1e3 * statistics.median(seconds[name])
        results[name].saved_bytes = saved_bytes(
            partial(model, **batches[0]), exclude=(*model.parameters(), *model.buffers(), *batches[0].values())
        )


def _step(fitted: Fitted, batch: Batch) -> None:
    fitted.model(**batch)[0].backward()
    fitted.optimizer.step()
    fitted.optimizer.zero_grad()


def table(results: Results, title: str) -> Table:
    """Accuracy for each task, and costs as means over the tasks."""
    rows = Table("", title=title, box=box.SIMPLE_HEAD)
    for name in METHODS:
        rows.add_column(name, justify="right")

    def row(label: str, figure: Callable[[list[Result]], str]) -> None:
        rows.add_row(label, *(figure([task[name] for task in results.values()]) for name in METHODS))

    def mean(field: str, unit: float, form: str) -> Callable[[list[Result]], str]:
        return lambda each: format(statistics.mean(getattr(r, field) for r in each) / unit, form)

    for index, task in enumerate(results):
        row(f"accuracy, {task}", lambda each, i=index: f"{each[i].accuracy:.1%}")  # type: ignore[misc]
    row("accuracy, mean", mean("accuracy", 1, ".1%"))
    row("trained parameters", mean("parameters", 1, ",.0f"))
    row("  without the head", mean("without_head", 1, ",.0f"))
    row("file of a task, KiB", mean("file_bytes", 2**10, ",.1f"))
    row("step, ms", mean("step_ms", 1, ",.1f"))
    row("optimizer state, KiB", mean("optimizer_bytes", 2**10, ",.1f"))
    row("saved activations, MiB", mean("saved_bytes", 2**20, ",.2f"))
    return rows


def plot(panels: dict[str, list[dict[str, Result]]], title: str, path: Path) -> None:
    """Accuracy against trained parameters, a panel per entry: the mean of its results, and their range as a bar."""
    from matplotlib import pyplot as plt

    columns = min(2, len(panels))
    shape, height = (math.ceil(len(panels) / columns), columns), 3.2 * math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        *shape, figsize=(max(6, 4.5 * columns), height + 1.2), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, each) in zip(axes.flat, panels.items()):
        for method, marker in MARKERS.items():
            reached = [100 * results[method].accuracy for results in each]
            middle = statistics.mean(reached)
            bar = [[middle - min(reached)], [max(reached) - middle]]
            count = each[0][method].parameters
            axis.errorbar(count, middle, yerr=bar, fmt=marker, markersize=8, capsize=3, label=method)
        axis.set(xscale="log", title=name)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("trained parameters, head included")
    figure.supylabel("held-out accuracy, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * columns)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def verdict(results: Results, judge_accuracy: bool) -> list[str]:
    """What is wrong with the outcome; empty when nothing is."""
    wrong = []
    for task, methods in results.items():
        for name, result in methods.items():
            if not all(map(math.isfinite, result.losses)):
                wrong.append(f"{name} on {task}: the loss became {result.losses[-1]}")
    for name in METHODS:
        ours, head = (
            statistics.mean(methods[each].accuracy for methods in results.values()) for each in (name, "head only")
        )
        if judge_accuracy and ours < head - ALLOWED_LOSS:
            wrong.append(f"{name} reached {ours:.1%} on average, far below the {head:.1%} of the head alone")
    return wrong
