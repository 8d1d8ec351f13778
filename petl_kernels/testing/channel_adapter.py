"""`channel_adapter` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.ops.channel_adapter import OP, channel_adapter
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `channel_adapter` with the sizes, layouts and options that the sample names.

    The channels are random, k of them (at most d), ascending as SCT picks them unless "shuffled".
    """
    generator = torch.Generator().manual_seed(seed)
    d, k = sample["d"], min(sample["k"], sample["d"])
    frozen = sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], scale: float, of: torch.dtype, shift: float = 0.0) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale + shift).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    own = parameter_dtype or dtype
    x = tensor("x", (*sample.get("leading", (sample["n"],)), d), 1.0, dtype)
    channels = torch.randperm(d, generator=generator)[:k]
    inputs: Inputs = {
        "x": lay_out(x, sample.get("layout")),
        "channels": (channels if sample.get("shuffled") else channels.sort().values).to(device),
        "weight": tensor("weight", (k, k), max(k, 1) ** -0.5, own),
        "bias": tensor("bias", (k,), 0.5, own) if sample.get("bias", True) else None,
    }
    scale = sample.get("scale", 1.0)
    inputs["scale"] = tensor("scale", scale, 0.1, own, shift=1.5) if isinstance(scale, tuple) else scale
    inputs["scale_input"] = sample.get("scale_input", False)
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [
        dict(n=0, d=16, k=2),
        dict(n=1, d=16, k=1),
        dict(n=15, d=96, k=12),
        dict(n=17, d=384, k=48),
        dict(n=37, d=768, k=96),
        dict(n=129, d=1000, k=24),
        dict(n=1000, d=96, k=24),
        dict(n=37, d=96, k=0),
        dict(n=15, d=96, k=96),
        dict(n=17, d=384, k=384),
    ]
    samples: list[dict[str, Any]] = []
    for size in sizes:
        for shuffled in (False, True):
            name = f"{size['n']}x{size['d']}x{size['k']}" + ("-shuffled" if shuffled else "")
            samples.append(dict(id=name, **size, shuffled=shuffled, scale=0.4, scale_input=shuffled))
    base = dict(n=19, d=48, k=6, shuffled=True)
    every = ("x", "weight", "bias", "scale")
    options: dict[str, dict[str, Any]] = {
        "scale-one": dict(),
        "scale-integer": dict(scale=2, scale_input=True),
        "scale-zero-dim": dict(scale=()),
        "scale-zero-dim-input": dict(scale=(), scale_input=True),
        "scale-learned": dict(scale=(1,)),
        "scale-learned-input": dict(scale=(1,), scale_input=True),
        "scale-learned-many-rows": dict(n=1000, d=96, k=24, scale=(1,)),
        "scale-learned-no-channels": dict(scale=(1,), k=0),
        "no-bias": dict(bias=False, scale=(1,)),
        "no-bias-input": dict(bias=False, scale=(1,), scale_input=True),
        "leading-3d": dict(leading=(2, 3, 7)),
        "leading-none": dict(leading=(), scale=(1,)),
        "leading-empty": dict(leading=(2, 0, 3), scale=(1,)),
        "x-strided": dict(layout="strided"),
        "x-transposed": dict(layout="transposed", leading=(5, 4)),
        "x-expanded": dict(layout="expanded"),
        "grad-expanded": dict(grad_layout="expanded"),
        "grad-transposed": dict(grad_layout="transposed", leading=(4, 5)),
        "frozen-x": dict(frozen=("x",), scale=(1,)),
        "frozen-all-but-x": dict(frozen=every[1:], scale=(1,), scale_input=True),
        "frozen-weight": dict(frozen=("weight",), scale=()),
        "frozen-weight-and-scale": dict(frozen=("weight", "scale"), scale=(1,)),
        "only-weight": dict(frozen=("x", "bias", "scale"), scale=0.4),
        "only-bias": dict(frozen=("x", "weight", "scale"), scale=(1,)),
        "only-scale": dict(frozen=every[:3], scale=(1,)),
        "only-scale-input": dict(frozen=every[:3], scale=(1,), scale_input=True),
        "frozen-all": dict(frozen=every, scale=(1,)),
    }
    samples += [{**base, "id": name, **extra} for name, extra in options.items()]
    return tuple(samples)


def _gather_linear_scatter(
    x: Tensor,
    channels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    scale_input: bool = False,
) -> Tensor:
    """The eager code that people write for the module, in the manner of SCT's own."""
    y = x.clone()
    chosen = x[..., channels]
    u = F.linear(chosen, weight, bias)
    y[..., channels] = scale * chosen + u if scale_input else chosen + scale * u
    return y


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: one product, x read and y written. Backward: two more, g read and dx written, x_C written and read."""
    n, d, k = sample["n"], sample["d"], sample["k"]
    return (2 * n * k * k, 2 * n * d) if mode == "forward" else (6 * n * k * k, 4 * n * d + 2 * n * k)


CASE = Case(
    name="channel_adapter",
    fn=channel_adapter,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48, k=6, scale=(1,), shuffled=True),
    variants=(
        dict(scale_input=True),
        dict(scale=0.4, bias=False),
        dict(scale=(), scale_input=True, bias=False, shuffled=False),
    ),
    tiny=dict(n=3, d=6, k=2),
    bench=tuple(
        dict(id=f"{n}x{d}x{k}", n=n, d=d, k=k)
        for n, d, k in [(12608, 768, 96), (4096, 768, 96), (12608, 768, 192), (4096, 1024, 32)]
    ),
    host=dict(id="4x16x8", n=4, d=16, k=8),
    cost=_cost,
    baselines={"gather-linear-scatter": _gather_linear_scatter},
)
