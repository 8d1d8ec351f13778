"""`bottleneck_adapter` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.bottleneck_adapter import OP, bottleneck_adapter
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `bottleneck_adapter` with the sizes, layouts and options that the sample names."""
    generator = torch.Generator().manual_seed(seed)
    d, r = sample["d"], sample["r"]
    d_out = sample.get("d_out", d)
    frozen = sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], scale: float, of: torch.dtype, shift: float = 0.0) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale + shift).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    own = parameter_dtype or dtype
    leading = sample.get("leading", (sample["n"],))
    x = tensor("x", (*leading, d), 1.0, dtype)
    inputs: Inputs = {"x": lay_out(x, sample.get("layout")), "w_down": tensor("w_down", (r, d), d**-0.5, own)}
    inputs["b_down"] = tensor("b_down", (r,), 0.5, own) if sample.get("b_down", True) else None
    inputs["w_up"] = tensor("w_up", (d_out, r), r**-0.5, own)
    inputs["b_up"] = tensor("b_up", (d_out,), 0.5, own) if sample.get("b_up", True) else None
    form = sample.get("residual", "x")
    if form == "x":
        inputs["residual"] = inputs["x"]
    elif form == "other":
        inputs["residual"] = tensor("residual", (*leading, d_out), 1.0, dtype)
    inputs["activation"] = sample.get("activation", "gelu")
    scale = sample.get("scale", 1.0)
    if isinstance(scale, tuple):
        shape = tuple(d_out if s == "d_out" else s for s in scale)
        scale = tensor("scale", shape, 0.1, own, shift=1.5)
    inputs["scale"] = scale
    gate = sample.get("gate")  # how many of x's leading dimensions it follows, as 1 does of [samples, tokens, d]
    if gate is not None:
        shape = (*leading[:gate], *(1 for _ in leading[gate:]), 1)
        inputs["gate"] = tensor("gate", shape, 0.3, own, shift=0.7)
    if dropout := sample.get("dropout", 0.0):
        inputs["dropout"] = dropout
        inputs["seed"] = torch.randint(-(2**62), 2**62, (1,), generator=generator).to(device)
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [
        dict(n=0, d=16, r=8),
        dict(n=1, d=16, r=1),
        dict(n=15, d=96, r=4),
        dict(n=16, d=96, r=8),
        dict(n=17, d=384, r=24),
        dict(n=37, d=768, r=64),
        dict(n=129, d=1000, r=100),
        dict(n=1000, d=96, r=8),
    ]
    activations = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "identity", "softmax")
    samples: list[dict[str, Any]] = [dict(id=f"{s['n']}x{s['d']}x{s['r']}", **s) for s in sizes]
    samples += [dict(id=f"act-{a}", n=37, d=96, r=24, activation=a) for a in activations]
    base = dict(n=19, d=48, r=5)
    every = ("x", "w_down", "b_down", "w_up", "b_up", "scale", "gate")
    options: dict[str, dict[str, Any]] = {
        "parallel": dict(residual="other"),
        "bare": dict(residual=None),
        "widening": dict(residual=None, d_out=80),
        "narrowing-parallel": dict(residual="other", d_out=33, scale=(1,)),
        "no-b_down": dict(b_down=False, scale=("d_out",)),
        "no-b_up": dict(b_up=False, scale=()),
        "no-biases": dict(b_down=False, b_up=False, residual=None),
        "scale-float": dict(scale=4.0, activation="relu"),
        "scale-zero-dim": dict(scale=()),
        "scale-one": dict(scale=(1,), residual="other", activation="silu"),
        "scale-channel": dict(scale=("d_out",)),
        "scale-channel-bare": dict(scale=("d_out",), residual=None),
        "dropout": dict(n=21, r=40, dropout=0.3, activation="relu"),
        "dropout-most": dict(dropout=0.9, scale=("d_out",), residual=None),
        "dropout-frozen-down": dict(dropout=0.5, frozen=("x", "w_down", "b_down")),
        "gate": dict(gate=1, residual="other"),
        "gate-per-sample": dict(gate=1, leading=(4, 5), scale=()),
        "gate-no-b_up": dict(gate=1, b_up=False, residual=None),
        "gate-of-one": dict(gate=0, r=32, scale=("d_out",)),
        "gate-dropout": dict(gate=1, dropout=0.2, leading=(2, 5), activation="silu"),
        "softmax-gate-dropout": dict(gate=1, dropout=0.2, activation="softmax", r=70, scale=(1,)),
        "softmax-of-one": dict(activation="softmax", r=1, frozen=("w_down", "b_down")),
        "frozen-gate": dict(gate=1, frozen=("gate",), scale=("d_out",)),
        "only-gate": dict(gate=1, frozen=every[:6], scale=("d_out",)),
        "leading-3d": dict(leading=(2, 3, 7)),
        "leading-none": dict(leading=()),
        "leading-empty": dict(leading=(2, 0, 3), scale=("d_out",)),
        "x-strided": dict(layout="strided"),
        "x-transposed": dict(layout="transposed", leading=(5, 4)),
        "x-expanded": dict(layout="expanded"),
        "grad-expanded": dict(grad_layout="expanded"),
        "grad-transposed": dict(grad_layout="transposed", leading=(4, 5)),
        "frozen-x": dict(frozen=("x",)),
        "frozen-all-but-x": dict(frozen=every[1:], scale=("d_out",)),
        "frozen-down": dict(frozen=("x", "w_down", "b_down")),
        "frozen-up": dict(frozen=("w_up", "b_up"), scale=(1,)),
        "only-b_up": dict(gate=1, dropout=0.2, frozen=("x", "w_down", "b_down", "w_up", "scale", "gate")),
        "only-scale": dict(gate=1, frozen=(*every[:5], "gate"), scale=("d_out",)),
        "only-residual": dict(frozen=every, residual="other"),
        "frozen-all": dict(frozen=every),
    }
    samples += [dict(base, id=name, **extra) for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: two GEMMs, x read and y written. Backward: four GEMMs, g and x read and dx written."""
    n, d, r = sample["n"], sample["d"], sample["r"]
    return (4 * n * d * r, 2 * n * d) if mode == "forward" else (12 * n * d * r, 5 * n * d)


CASE = Case(
    name="bottleneck_adapter",
    fn=bottleneck_adapter,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48, r=5, residual="other", scale=("d_out",), gate=1, dropout=0.2),
    variants=(
        dict(residual="x", gate=None, dropout=0.0),
        dict(residual=None, scale=2.0, activation="softmax"),
        dict(residual=None, b_down=False, b_up=False, scale=(1,), dropout=0.0),
    ),
    tiny=dict(n=3, d=6, r=2),
    bench=tuple(
        dict(id=f"{n}x{d}x{r}", n=n, d=d, r=r)
        for n, d, r in [
            (1024, 768, 8),
            (1024, 768, 64),
            (4096, 768, 64),
            (4096, 1024, 16),
            (12608, 768, 64),
            (4096, 4096, 64),
        ]
    ),
    host=dict(id="4x16x8", n=4, d=16, r=8),
    cost=_cost,
)
