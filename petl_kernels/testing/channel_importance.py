"""`channel_importance` in the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops.channel_importance import OP, channel_importance
from petl_kernels.testing._case import Case, Inputs, lay_out


def _shape(sample: Mapping[str, Any]) -> tuple[int, ...]:
    return (*(sample["leading"] if "leading" in sample else (sample["n"],)), sample["d"])


def _inputs(
    sample: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded inputs of `channel_importance`; the gradient takes the parameters' dtype where one is given."""
    generator = torch.Generator().manual_seed(seed)
    shape = _shape(sample)

    def tensor(of: torch.dtype, layout: str | None) -> Tensor:
        return lay_out(torch.randn(shape, generator=generator).to(of).to(device), layout)

    activation = tensor(dtype, sample.get("layout"))
    grad = activation if sample.get("grad") == "activation" else tensor(parameter_dtype or dtype, sample.get("grad"))
    return {"activation": activation, "grad": grad, "reduction": sample.get("reduction", "sq_batch")}


def _samples() -> tuple[Mapping[str, Any], ...]:
    sizes = [(0, 16), (1, 16), (15, 96), (16, 1), (17, 384), (37, 768), (129, 1000), (1000, 96)]
    samples: list[dict[str, Any]] = [dict(id=f"{n}x{d}", n=n, d=d) for n, d in sizes]
    base = dict(n=19, d=48)
    for reduction in ("sq_batch", "sq_sample", "abs"):
        options: dict[str, dict[str, Any]] = {
            "rows": {},
            "many-rows": dict(n=700, d=33),
            "leading-3d": dict(leading=(3, 70, 2)),
            "long-samples": dict(leading=(2, 300)),
            "leading-none": dict(leading=()),
            "leading-empty": dict(leading=(2, 0, 3)),
            "empty-batch": dict(leading=(0, 5)),
            "strided": dict(layout="strided", grad="strided"),
            "transposed": dict(layout="transposed", leading=(5, 4)),
            "grad-transposed": dict(grad="transposed", leading=(5, 4)),
            "expanded": dict(layout="expanded"),
            "grad-expanded": dict(grad="expanded"),
        }
        samples += [dict(base, id=f"{reduction}-{name}", reduction=reduction, **o) for name, o in options.items()]
    return tuple(samples)


def _cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """A product and a sum per element; both operands are read once."""
    elements = math.prod(_shape(sample))
    return 2 * elements, 2 * elements


def _product_sum(activation: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """What people write, in the operands' dtype."""
    product = activation * grad
    if reduction == "abs":
        return product.abs().flatten(0, -2).sum(0)
    if reduction == "sq_sample":
        return product.flatten(1, -2).sum(1).square().sum(0)
    return product.flatten(0, -2).sum(0).square()


CASE = Case(
    name="channel_importance",
    fn=channel_importance,
    op=OP,
    inputs=_inputs,
    samples=_samples(),
    typical=dict(id="typical", n=19, d=48),
    variants=(dict(reduction="sq_sample", leading=(3, 7)), dict(reduction="abs")),
    tiny=dict(n=3, d=6),
    bench=(
        dict(id="12608x768", n=12608, d=768),
        dict(id="4096x768", n=4096, d=768),
        dict(id="4096x3072", n=4096, d=3072),
        dict(id="sq_sample-64x197x768", n=12608, d=768, leading=(64, 197), reduction="sq_sample"),
        dict(id="abs-12608x768", n=12608, d=768, reduction="abs"),
    ),
    # One tensor as both operands, so that the call is a function of a single input, which exporting wants.
    host=dict(id="4x16", n=4, d=16, grad="activation"),
    cost=_cost,
    baselines={"(a*g).sum": _product_sum},
)
