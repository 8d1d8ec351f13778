"""A whole training step of BERT base and ViT-B/16: forward, backward, AdamW on what trains, in bfloat16.

Providers: `frozen`, the backbone alone with a gradient through all of it, below which no method can come; `eager` and
`compile`, the method in plain PyTorch; `fused` and `fused+compile`, on the kernels. Blocks are compiled one by one and
share their code, which takes a twelfth of compiling the model and leaves the embedding and the head in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.clocks import times
from gpu.device import Call
from gpu.report import Measurement, print_group
from gpu.suite import Suite
from petl_kernels import use_impl
from petl_kernels.profiling import saved_bytes
from petl_kernels.testing.models import BERT, METHODS, Encoder, ViT, nothing

MODELS: dict[str, Callable[[], Encoder]] = {"bert-base": BERT, "vit-b16": ViT}
BATCHES = (64, 8)
FLOOR = 2.0**-8  # of bfloat16, relative to what is compared


@dataclass
class Step:
    """One model with one method, and what a step of it takes."""

    model: Encoder
    inputs: Tensor
    impl: str
    compiled: bool = False
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.labels = torch.zeros(len(self.inputs), dtype=torch.int64, device=self.inputs.device)
        fused = self.inputs.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=fused, capturable=fused)
        if self.compiled:
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def loss(self) -> Tensor:
        with use_impl(self.impl):
            return F.cross_entropy(self.model(self.inputs).float(), self.labels)

    def gradients(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(), self.trained))

    def __call__(self) -> None:
        for parameter, gradient in zip(self.trained, self.gradients()):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.trained:  # freed here, or a captured step would hold on to the gradients of its graph
            parameter.grad = None


def build(make: Callable[[], Encoder], method: Callable[[Encoder], None], device: str) -> Encoder:
    """The model with the method in it; the same weights at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = make().to(torch.bfloat16)
        method(model)
    return model


def fused_on(suite: Suite) -> str:
    """What "fused" runs on: Triton, whose kernels take all of these calls (the CUDA ones stop at r = 256)."""
    return "triton" if suite.device.kind == "cuda" else "cpp"


def wrong(make: Callable[[], Encoder], name: str, suite: Suite, inputs: Tensor) -> list[str]:
    """Where the fused step's loss or gradients are further from float32's than three times eager's are.

    In the Euclidean norm of all gradients together: the largest error of a single element, by which each op by itself
    is judged, says little behind so many layers. Zeros are as far away as the gradients are long, which the bound must
    stay below.
    """
    models = [build(make, METHODS[name], suite.device.kind) for _ in range(3)]
    exact = inputs.float() if inputs.is_floating_point() else inputs
    ours, eager = (Step(m, inputs, impl) for m, impl in zip(models, (fused_on(suite), "reference")))
    outcomes = [_outcome(step) for step in (ours, eager, Step(models[2].float(), exact, "reference"))]
    found = []
    for part, got, same, true in zip(("loss", "gradient"), *outcomes):
        error, length = (got - true).norm().item(), true.norm().item()
        bound = 3 * (same - true).norm().item() + FLOOR * length
        if not error <= bound or bound >= length:
            found.append(f"{name}: the fused {part} is off by {error:.2g} of {length:.2g}, where {bound:.2g} may be")
    return found


def _outcome(step: Step) -> tuple[Tensor, Tensor]:
    """The loss and all gradients as vectors."""
    return step.loss().detach().double(), torch.cat([g.double().flatten() for g in step.gradients()])


def measure(suite: Suite, models: dict[str, Callable[[], Encoder]] = MODELS, batches: Any = BATCHES) -> list[str]:
    """Time the steps for which there is time; what comes back is wrong, and was not timed."""
    found: list[str] = []
    left = []
    if suite.kernels is not None and fused_on(suite) not in suite.kernels:
        suite.notes.append(f"training steps, which run on {fused_on(suite)}")
        return found
    for batch, name, method in _combinations(models, batches):
        label = f"{name} {method} batch {batch}"
        if not suite.budget.allows("step"):
            left.append(label)
            continue
        try:
            found += suite.budget.run("step", partial(_measure, suite, models[name], name, method, batch))
        except torch.OutOfMemoryError:
            suite.notes.append(f"{label}: it does not fit the memory")
    if left:
        suite.notes.append(f"no time for the steps of {', '.join(left)}")
    return found


def _combinations(models: Any, batches: Any) -> Iterator[tuple[int, str, str]]:
    for batch in batches:
        for method in METHODS:
            for name in models:
                yield batch, name, method


def _measure(suite: Suite, make: Callable[[], Encoder], name: str, method: str, batch: int) -> list[str]:
    device, label = suite.device, f"{name} {method} batch {batch}"
    inputs = build(make, METHODS[method], device.kind).batch(batch, device.kind)
    if failures := wrong(make, method, suite, inputs[:8]):
        return [f"{name} {f}" for f in failures]
    impl = fused_on(suite)
    who = {"frozen": (nothing, "reference", False), "eager": (METHODS[method], "reference", False)}
    who["fused"] = (METHODS[method], impl, False)
    torch._dynamo.reset()
    if suite.compile and suite.budget.allows("step compiled"):
        who["compile"] = (METHODS[method], "reference", True)
        who["fused+compile"] = (METHODS[method], impl, True)
    steps = {n: Step(build(make, how, device.kind), inputs, which, c) for n, (how, which, c) in who.items()}
    for provider, (_, _, compiled) in who.items():
        if compiled:
            suite.budget.run("step compiled", steps[provider])
    calls: dict[str, list[Call]] = {n: [step] for n, step in steps.items()}
    taken, notes = times(device, calls)
    suite.notes += [f"{label}: {note}" for note in notes]
    sample = {"id": f"{name}-{method}-{batch}", "batch": batch, "model": name, "method": method}
    group = [
        Measurement(
            "training_step",
            n,
            "step",
            sample,
            "bfloat16",
            taken[n],
            0,
            suite.rate,
            device.capability,
            saved_bytes=saved_bytes(steps[n].loss, exclude=steps[n].model.parameters()),
            peak_bytes=device.peak_bytes(step),
        )
        for n, step in steps.items()
    ]
    suite.found += group
    print_group(suite.console, group)
    return []
