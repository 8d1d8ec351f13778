"""`adapter_norm` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.adapter_norm import OP, adapter_norm
from petl_kernels.testing._case import Case, Inputs, lay_out


def site(
    sample: Mapping[str, Any], dtype: torch.dtype, parameter_dtype: torch.dtype | None, device: str, seed: int
) -> Inputs:
    """What `adapter_norm` and `norm_adapter` both take: x, the adapter, a norm as wide as the sample's "norm_width"."""
    generator = torch.Generator().manual_seed(seed)
    d, r = sample["d"], sample["r"]
    d_out = sample.get("d_out", d)
    frozen = sample.get("frozen", ())
    own = parameter_dtype or dtype
    leading = sample.get("leading", (sample["n"],))

    def tensor(name: str, shape: tuple[int, ...], std: float, of: torch.dtype, mean: float = 0.0) -> Tensor:
        value = (torch.randn(shape, generator=generator) * std + mean).to(of).to(device)
        return value.requires_grad_(name not in frozen)

    x = lay_out(tensor("x", (*leading, d), 1.0, dtype, sample.get("x_mean", 0.0)), sample.get("layout"))
    inputs: Inputs = {"x": x, "w_down": tensor("w_down", (r, d), d**-0.5, own)}
    inputs["b_down"] = tensor("b_down", (r,), 0.5, own) if sample.get("biases", True) else None
    inputs["w_up"] = tensor("w_up", (d_out, r), r**-0.5, own)
    inputs["b_up"] = tensor("b_up", (d_out,), 0.5, own) if sample.get("biases", True) else None
    width = sample.get("norm_width", d_out)
    inputs["ln_weight"] = tensor("ln_weight", (width,), 0.5, own, 1.0) if sample.get("affine", True) else None
    rms = sample.get("norm") == "rms"
    inputs["ln_bias"] = tensor("ln_bias", (width,), 0.5, own) if sample.get("affine", True) and not rms else None
    for name in ("residual", "hidden"):
        form = sample.get(name)
        mean = sample.get(f"{name}_mean", 0.0)
        inputs[name] = x if form == "x" else tensor(name, (*leading, d_out), 1.0, dtype, mean) if form else None
    scale = sample.get("scale", 1.0)
    if isinstance(scale, tuple):
        shape = tuple(d_out if s == "d_out" else s for s in scale)
        scale = tensor("scale", shape, 0.1, own, 1.5)
    inputs["scale"] = scale
    inputs |= {name: sample[name] for name in ("activation", "norm", "eps") if name in sample}
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `adapter_norm` with the sizes, layouts and options that the sample names."""
    return site({"residual": "other", **sample}, dtype, parameter_dtype, device, seed)


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [(0, 16, 8), (1, 16, 1), (17, 200, 64), (40, 136, 100), (130, 96, 8)]
    samples: list[dict[str, Any]] = [dict(id=f"{n}x{d}x{r}", n=n, d=d, r=r) for n, d, r in sizes]
    adapter = ("w_down", "b_down", "w_up", "b_up", "scale")
    norm = ("ln_weight", "ln_bias")
    options: dict[str, dict[str, Any]] = {
        "rms": dict(norm="rms", activation="silu", scale=("d_out",)),
        "parallel": dict(hidden="other", d=101, d_out=33, scale=(1,), activation="relu"),
        "parallel-rms-no-residual": dict(hidden="other", residual=None, norm="rms", eps=0.5),
        "no-residual": dict(residual=None, scale=4.0, activation="tanh"),
        "plain": dict(biases=False, affine=False),
        "layouts": dict(layout="transposed", grad_layout="transposed", leading=(5, 4)),
        "strided": dict(layout="strided", grad_layout="expanded", d=61),
        "frozen-norm": dict(frozen=norm),
        "frozen-adapter": dict(frozen=adapter),
        "frozen-inputs": dict(frozen=("x", "residual")),
        "parallel-frozen-down": dict(hidden="other", frozen=("x", "w_down", "b_down")),
        "only-norm": dict(scale=(), frozen=("x", "residual", *adapter)),
        "only-residual": dict(frozen=("x", *adapter, *norm)),
        "frozen-all": dict(frozen=("x", "residual", *adapter, *norm)),
    }
    samples += [{**dict(n=19, d=48, r=5), **extra, "id": name} for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: two products, x and residual read, y written. Backward: four products, g, x and the sum read in some
    form, dx and dresidual written."""
    n, d, r = sample["n"], sample["d"], sample["r"]
    return (4 * n * d * r, 3 * n * d) if mode == "forward" else (12 * n * d * r, 8 * n * d)


CASE = Case(
    name="adapter_norm",
    fn=adapter_norm,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48, r=5, scale=("d_out",)),
    variants=(dict(hidden="other", scale=2.0), dict(norm="rms", biases=False, scale=(1,))),
    tiny=dict(n=3, d=6, r=2),
    bench=tuple(
        dict(id=f"{n}x{d}x{r}", n=n, d=d, r=r)
        for n, d, r in [(1024, 768, 64), (4096, 768, 16), (4096, 768, 64), (12608, 768, 64), (4096, 4096, 64)]
    ),
    host=dict(id="4x16x8", n=4, d=16, r=8, residual="x"),
    cost=_cost,
)
