"""`layer_norm` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.layer_norm import OP, layer_norm
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `layer_norm` with the sizes, layouts and options that the sample names."""
    generator = torch.Generator().manual_seed(seed)
    d = sample["d"]
    frozen = sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], scale: float, of: torch.dtype, shift: float) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale + shift).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    own = parameter_dtype or dtype
    leading = sample["leading"] if "leading" in sample else (sample["n"],)
    x = tensor("x", (*leading, d), sample.get("std", 2.0), dtype, sample.get("offset", 0.5))
    inputs: Inputs = {
        "x": lay_out(x, sample.get("layout")),
        "weight": tensor("weight", (d,), 0.5, own, 1.0) if sample.get("weight", True) else None,
        "bias": tensor("bias", (d,), 0.5, own, 0.0) if sample.get("bias", True) else None,
        "grad_layout": sample.get("grad_layout"),
    }
    if "eps" in sample:
        inputs["eps"] = sample["eps"]
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [(0, 16), (1, 16), (15, 96), (16, 96), (17, 384), (37, 768), (129, 1000), (1000, 96)]
    samples: list[dict[str, Any]] = [dict(id=f"{n}x{d}", n=n, d=d) for n, d in sizes]
    base = dict(n=19, d=48)
    options: dict[str, dict[str, Any]] = {
        "no-bias": dict(bias=False),
        "no-weight": dict(weight=False),
        "no-parameters": dict(weight=False, bias=False),
        "eps": dict(eps=0.5),
        "odd-width": dict(d=61),
        "narrow": dict(d=3),
        "leading-3d": dict(leading=(2, 3, 7)),
        "leading-none": dict(leading=()),
        "leading-empty": dict(leading=(2, 0, 3)),
        "x-strided": dict(layout="strided"),
        "x-transposed": dict(layout="transposed", leading=(5, 4)),
        "x-expanded": dict(layout="expanded"),
        "grad-expanded": dict(grad_layout="expanded"),
        "grad-transposed": dict(grad_layout="transposed", leading=(4, 5)),
        "frozen-x": dict(frozen=("x",)),
        "frozen-parameters": dict(frozen=("weight", "bias")),
        "only-weight": dict(frozen=("x", "bias")),
        "only-bias": dict(frozen=("x", "weight")),
        "frozen-weight": dict(frozen=("weight",)),
        "frozen-all": dict(frozen=("x", "weight", "bias")),
    }
    samples += [{**base, "id": name, **extra} for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: x read and y written. Backward: g and x read, and dx written where x trains."""
    elements = sample["n"] * sample["d"]
    if mode == "forward":
        return 7 * elements, 2 * elements
    frozen = "x" in sample.get("frozen", ())
    return (11 if frozen else 18) * elements, (4 if frozen else 5) * elements


CASE = Case(
    name="layer_norm",
    fn=layer_norm,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48),
    variants=(dict(bias=False), dict(weight=False, bias=False), dict(frozen=("x",))),
    tiny=dict(n=3, d=6),
    bench=tuple(
        dict(id=f"{n}x{d}{'-frozen-x' if frozen else ''}", n=n, d=d, frozen=frozen)
        for n, d in [(4096, 768), (12608, 768), (4096, 1024), (4096, 4096)]
        for frozen in ((), ("x",))
    ),
    host=dict(id="4x16", n=4, d=16),
    cost=_cost,
)
