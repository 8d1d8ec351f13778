"""`adapter_bank` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.adapter_bank import OP, adapter_bank
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of n samples of `tokens` rows, or of `samples` of n, and with the options that the sample names.

    Tasks are drawn with repetition, so that their order is any and some have no sample. "per" says what has a task of
    its own: a "sample", a "token" (each row), or "all" of it. Parameters come stacked: the table knows tensors only.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d, r, tasks = sample["n"], sample["d"], sample["r"], sample["tasks"]
    d_out, tokens, frozen = sample.get("d_out", d), sample.get("tokens", (3,)), sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], scale: float, of: torch.dtype) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    own = parameter_dtype or dtype
    samples = sample.get("samples", ())
    rows = (*samples, n, *tokens)
    x = tensor("x", (*rows, d), 1.0, dtype)
    shape = {"all": (), "sample": samples or (n,), "token": rows}[sample.get("per", "sample")]
    task = torch.randint(tasks, shape, generator=generator)
    inputs: Inputs = {"x": lay_out(x, sample.get("layout")), "task": task.to(device)}
    inputs["w_down"] = tensor("w_down", (tasks, r, d), d**-0.5, own)
    inputs["b_down"] = tensor("b_down", (tasks, r), 0.5, own) if sample.get("bias", True) else None
    inputs["w_up"] = tensor("w_up", (tasks, d_out, r), r**-0.5, own)
    inputs["b_up"] = tensor("b_up", (tasks, d_out), 0.5, own) if sample.get("bias", True) else None
    form = sample.get("residual", "x")
    if form == "x":
        inputs["residual"] = inputs["x"]
    elif form == "other":
        inputs["residual"] = tensor("residual", (*rows, d_out), 1.0, dtype)
    inputs["activation"], inputs["scale"] = sample.get("activation", "gelu"), sample.get("scale", 1.0)
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    every = ("x", "w_down", "b_down", "w_up", "b_up")
    base = dict(n=5, d=48, r=5, tasks=3)
    options: dict[str, dict[str, Any]] = {
        "empty": dict(n=0),
        "long": dict(n=4, tokens=(130,), d=96, r=24),
        "wide": dict(n=3, tokens=(17,), d=200, r=70, tasks=2, activation="relu"),
        "one-row": dict(n=37, tokens=(), tasks=4),
        "per-token": dict(tokens=(2, 3), per="token", residual="other", scale=2.0, activation="silu"),
        "one-task": dict(per="all", residual=None, d_out=33, activation="tanh"),
        "no-biases": dict(bias=False, layout="transposed", grad_layout="expanded", activation="identity"),
        "frozen-x": dict(frozen=("x",), residual=None),
        "frozen-all-but-x": dict(frozen=every[1:], layout="strided", grad_layout="transposed"),
        "only-b_up": dict(frozen=every[:4]),
        "frozen-all": dict(frozen=every),
    }
    return tuple({"id": name, **base, **extra} for name, extra in options.items())


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: two products, x read and y written. Backward: four products, g and x read and dx written."""
    rows = sample["n"] * torch.Size(sample["tokens"]).numel()
    d, r = sample["d"], sample["r"]
    return (4 * rows * d * r, 2 * rows * d) if mode == "forward" else (12 * rows * d * r, 5 * rows * d)


CASE = Case(
    name="adapter_bank",
    fn=adapter_bank,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", samples=(4,), n=19, d=48, r=5, tasks=3, tokens=(), residual="other", scale=2.0),
    variants=(dict(residual="x"), dict(residual=None, bias=False)),
    tiny=dict(n=3, d=6, r=2),
    bench=(dict(id="32x768x64x16", n=32, d=768, r=64, tasks=16, tokens=(128,)),),
    host=dict(id="4x16x8x2", n=4, d=16, r=8, tasks=2, tokens=(), per="all"),
    cost=_cost,
)
