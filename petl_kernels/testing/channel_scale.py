"""`channel_scale` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.channel_scale import OP, channel_scale
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `channel_scale` with the sizes, layouts and options that the sample names."""
    generator = torch.Generator().manual_seed(seed)
    d = sample["d"]
    frozen = sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], size: float, of: torch.dtype, shift: float) -> Tensor:
        value = (torch.randn(shape, generator=generator) * size + shift).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    leading = sample["leading"] if "leading" in sample else (sample["n"],)
    x = tensor("x", (*leading, d), 2.0, dtype, 0.5)
    scale = tensor("scale", (d,), 0.5, parameter_dtype or dtype, 1.0)
    return {"x": lay_out(x, sample.get("layout")), "scale": scale, "grad_layout": sample.get("grad_layout")}


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [(0, 16), (1, 16), (15, 96), (16, 96), (17, 384), (37, 768), (129, 1000), (1000, 96), (5, 3072)]
    samples: list[dict[str, Any]] = [dict(id=f"{n}x{d}", n=n, d=d) for n, d in sizes]
    base = dict(n=19, d=48)
    options: dict[str, dict[str, Any]] = {
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
        "frozen-scale": dict(frozen=("scale",)),
        "frozen-all": dict(frozen=("x", "scale")),
    }
    samples += [{**base, "id": name, **extra} for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: x read and y written. Backward: g and x read, and dx written where x trains."""
    elements = sample["n"] * sample["d"]
    if mode == "forward":
        return elements, 2 * elements
    frozen = "x" in sample.get("frozen", ())
    flops, moved = (2, 2) if frozen else (3, 3)
    if mode == "full":
        flops, moved = flops + 1, moved + 2
    return flops * elements, moved * elements


CASE = Case(
    name="channel_scale",
    fn=channel_scale,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48),
    variants=(dict(frozen=("x",)), dict(frozen=("scale",))),
    tiny=dict(n=3, d=6),
    bench=tuple(
        dict(id=f"{n}x{d}{'-frozen-x' if frozen else ''}", n=n, d=d, frozen=frozen)
        for n, d in [(512, 768), (4096, 768), (12608, 768), (4096, 3072), (2048, 11008)]
        for frozen in ((), ("x",))
    ),
    host=dict(id="4x16", n=4, d=16),
    cost=_cost,
)
