"""`channel_linear` in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.ops.channel_linear import OP, channel_linear
from petl_kernels.testing._case import Case, Inputs, lay_out


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `channel_linear`; d is d_in, k of the d_out rows or ("columns") of the d columns are trained."""
    generator = torch.Generator().manual_seed(seed)
    d, d_out = sample["d"], sample.get("d_out", sample["d"])
    dim = int(sample.get("columns", False))
    size = (d_out, d)[dim]
    k = min(sample["k"], size)
    untrained = sample.get("frozen", ())

    def tensor(name: str, shape: tuple[int, ...], scale: float, of: torch.dtype) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale).to(of).to(device)
        return value.requires_grad_(name not in ("weight", "bias", *untrained))

    own = parameter_dtype or dtype
    x = tensor("x", (*sample.get("leading", (sample["n"],)), d), 1.0, dtype)
    inputs: Inputs = {"x": lay_out(x, sample.get("layout")), "weight": tensor("weight", (d_out, d), d**-0.5, dtype)}
    bias = sample.get("bias", True)
    inputs["bias"] = tensor("bias", (d_out,), 0.5, dtype) if bias else None
    channels = torch.randperm(size, generator=generator)[:k].to(device)
    inputs["channels"] = channels.sort().values if sample.get("sorted") else channels
    inputs["channel_weight"] = tensor("channel_weight", (d_out, k) if dim else (k, d), d**-0.5, own)
    trained_bias = bias and not dim and sample.get("channel_bias", True)
    inputs["channel_bias"] = tensor("channel_bias", (k,), 0.5, own) if trained_bias else None
    inputs["dim"] = dim
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [
        dict(n=0, d=16, k=8),
        dict(n=1, d=16, k=1),
        dict(n=15, d=96, k=4),
        dict(n=17, d=384, k=24),
        dict(n=37, d=768, k=96),
        dict(n=129, d=1000, d_out=100, k=100),
        dict(n=1000, d=96, d_out=33, k=8),
    ]
    samples: list[dict[str, Any]] = []
    for size in sizes:
        name = f"{size['n']}x{size['d']}x{size['k']}"
        samples += [dict(size, id=name), dict(size, id=f"{name}-columns", columns=True)]
    base = dict(n=19, d=48, d_out=56, k=11)
    options: dict[str, dict[str, Any]] = {
        "none": dict(k=0),
        "all": dict(k=56),
        "all-columns": dict(k=48, columns=True),
        "none-columns": dict(k=0, columns=True),
        "sorted": dict(sorted=True),
        "no-bias": dict(bias=False),
        "no-bias-columns": dict(bias=False, columns=True),
        "frozen-bias": dict(channel_bias=False),
        "leading-3d": dict(leading=(2, 3, 7)),
        "leading-3d-columns": dict(leading=(2, 3, 7), columns=True),
        "leading-none": dict(leading=()),
        "leading-empty": dict(leading=(2, 0, 3)),
        "x-strided": dict(layout="strided"),
        "x-transposed": dict(layout="transposed", leading=(5, 4)),
        "x-expanded": dict(layout="expanded"),
        "x-expanded-columns": dict(layout="expanded", columns=True),
        "grad-expanded": dict(grad_layout="expanded"),
        "grad-transposed": dict(grad_layout="transposed", leading=(4, 5)),
        "grad-transposed-columns": dict(grad_layout="transposed", columns=True),
        "frozen-x": dict(frozen=("x",)),
        "frozen-x-columns": dict(frozen=("x",), columns=True),
        "only-x": dict(frozen=("channel_weight", "channel_bias")),
        "only-channel_bias": dict(frozen=("x", "channel_weight")),
        "only-channel_weight": dict(frozen=("x", "channel_bias")),
        "frozen-all": dict(frozen=("x", "channel_weight", "channel_bias")),
    }
    samples += [dict(base, id=name, **extra) for name, extra in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward and dx are a product each, the chosen gradient k/d of one; each operand moves once."""
    n, d, k = sample["n"], sample["d"], sample["k"]
    dx = "x" not in sample.get("frozen", ())
    forward = 2 * n * d * d, 2 * n * d + d * d
    backward = 2 * n * d * (k + d * dx), 2 * n * d + k * d + (n * d + d * d) * dx
    if mode == "full":
        return forward[0] + backward[0], forward[1] + backward[1]
    return forward if mode == "forward" else backward


class _DenseAndMask(torch.autograd.Function):
    """What others do: the whole gradient of the weight, times a mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, channels: Tensor, dim: int, *tuned: Any
    ) -> Tensor:
        mask = torch.zeros_like(weight).index_fill_(dim, channels, 1)
        ctx.save_for_backward(x, weight, mask, channels)
        ctx.dim = dim
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, channels = ctx.saved_tensors
        dx = g.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = g.flatten(0, -2)
        dw = rows.t().matmul(x.flatten(0, -2)).mul_(mask)
        db = rows.sum(0).index_select(0, channels) if ctx.needs_input_grad[6] else None
        return dx, None, None, None, None, dw.index_select(ctx.dim, channels), db


def _dense_and_mask(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
) -> Tensor:
    with torch.no_grad():
        weight.index_copy_(dim, channels, channel_weight)
        if bias is not None and channel_bias is not None:
            bias.index_copy_(0, channels, channel_bias)
    return _DenseAndMask.apply(x, weight, bias, channels, dim, channel_weight, channel_bias)


CASE = Case(
    name="channel_linear",
    fn=channel_linear,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48, d_out=56, k=11),
    variants=(dict(columns=True), dict(bias=False), dict(channel_bias=False)),
    tiny=dict(n=3, d=6, d_out=5, k=2),
    bench=(
        dict(id="4096x768x96", n=4096, d=768, k=96),
        dict(id="4096x3072x384", n=4096, d=3072, k=384),
        dict(id="4096x768x96-columns", n=4096, d=768, k=96, columns=True),
        dict(id="4096x768x96-frozen-x", n=4096, d=768, k=96, frozen=("x",)),
        dict(id="4096x3072x384-frozen-x", n=4096, d=3072, k=384, frozen=("x",)),
    ),
    host=dict(id="4x16x4", n=4, d=16, k=4),
    cost=_cost,
    baselines={"dense+mask": _dense_and_mask},
)
