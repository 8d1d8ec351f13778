"""`norm_adapter` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from petl_kernels.ops.norm_adapter import OP, norm_adapter
from petl_kernels.testing._case import Case, Inputs
from petl_kernels.testing.adapter_norm import site


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `norm_adapter` with the sizes, layouts and options that the sample names."""
    inputs = site({"residual": "x", "norm_width": sample["d"], **sample}, dtype, parameter_dtype, device, seed)
    del inputs["hidden"]
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [(0, 16, 8), (1, 16, 1), (17, 200, 64), (40, 136, 100), (130, 96, 8)]
    samples: list[dict[str, Any]] = [dict(id=f"{n}x{d}x{r}", n=n, d=d, r=r) for n, d, r in sizes]
    adapter = ("w_down", "b_down", "w_up", "b_up", "scale")
    norm = ("ln_weight", "ln_bias")
    options: dict[str, dict[str, Any]] = {
        "rms": dict(n=23, norm="rms", activation="silu", scale=("d_out",)),
        "parallel": dict(residual="other", scale=(1,), activation="relu"),
        "bare-widening": dict(residual=None, d_out=80, norm="rms", eps=0.5),
        "narrowing": dict(residual="other", d_out=33, scale=4.0, activation="tanh"),
        "plain": dict(biases=False, affine=False),
        "layouts": dict(layout="transposed", grad_layout="transposed", leading=(5, 4)),
        "strided": dict(layout="strided", grad_layout="expanded", d=61),
        "frozen-norm": dict(frozen=norm),
        "frozen-adapter": dict(frozen=adapter),
        "frozen-x": dict(frozen=("x",)),
        "frozen-down": dict(frozen=("x", "w_down", "b_down")),
        "only-norm": dict(frozen=("x", *adapter)),
        "only-ln_bias": dict(frozen=("x", *adapter, "ln_weight")),
        "only-up": dict(scale=(), frozen=("x", "w_down", "b_down", *norm)),
        "only-residual": dict(residual="other", frozen=("x", *adapter, *norm)),
        "frozen-all": dict(frozen=("x", *adapter, *norm)),
    }
    samples += [{**dict(n=19, d=40, r=5), **extra, "id": name} for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: two products, x read and y written. Backward: four products, g and x read and dx written."""
    n, d, r = sample["n"], sample["d"], sample["r"]
    return (4 * n * d * r, 2 * n * d) if mode == "forward" else (12 * n * d * r, 5 * n * d)


CASE = Case(
    name="norm_adapter",
    fn=norm_adapter,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=40, r=5, residual="other", scale=("d_out",)),
    variants=(dict(residual="x", scale=2.0), dict(residual=None, norm="rms", biases=False, scale=(1,))),
    tiny=dict(n=3, d=6, r=2),
    bench=tuple(
        dict(id=f"{n}x{d}x{r}", n=n, d=d, r=r)
        for n, d, r in [(1024, 768, 64), (4096, 768, 16), (4096, 768, 64), (12608, 768, 64), (4096, 4096, 64)]
    ),
    host=dict(id="4x16x8", n=4, d=16, r=8),
    cost=_cost,
)
