"""The one table that drives tests and benchmarks, and the rule by which an implementation is judged.

A case names a public op, the calls to test it with and the shapes to time it at. `tests/test_ops.py` and
`benchmarks/run.py` read `CASES` and contain no op's name: adding an op adds one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._op import Op
from petl_kernels.ops.bottleneck_adapter import OP as BOTTLENECK_ADAPTER
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op: what to call, with which inputs, and what it costs.

    Attributes:
        name: the op's name.
        fn: the public function; takes `impl=`.
        op: its `Op`, which knows the implementations.
        inputs: `(sample, dtype, parameter_dtype, device, seed) -> keyword arguments of fn`.
        samples: the calls to test, each a mapping that `inputs` understands; "id" names it.
        typical: a small call in which every tensor argument is given and trains.
        bench: the calls to time; their integers, in order, are the shape on the benchmark's command line.
        host: a call so small that its time is what Python and the dispatcher cost.
        cost: `(sample, mode) -> (flops, ideal elements moved)`; mode is "forward" or "full" (with the backward).
    """

    name: str
    fn: Callable[..., Tensor]
    op: Op
    inputs: Callable[..., Inputs]
    samples: tuple[Mapping[str, Any], ...]
    typical: Mapping[str, Any]
    bench: tuple[Mapping[str, Any], ...]
    host: Mapping[str, Any]
    cost: Callable[[Mapping[str, Any], str], tuple[int, int]]


@dataclass(frozen=True)
class Outcome:
    """What a call gave: its output and the gradient of each tensor that asked for one."""

    output: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)

    def items(self) -> list[tuple[str, Tensor]]:
        return [("output", self.output), *((f"d{name}", grad) for name, grad in self.grads.items())]


def arguments(inputs: Inputs) -> Inputs:
    """The inputs that are arguments of the op: all but "grad_layout", which shapes the gradient `run` sends back."""
    return {name: value for name, value in inputs.items() if name != "grad_layout"}


def run(fn: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Outcome:
    """Call `fn` and backpropagate a fixed random gradient to every input tensor that requires one.

    The input "grad_layout" (None, "expanded" or "transposed") shapes that gradient.
    """
    kwargs = arguments(inputs)
    output = fn(**kwargs, **options)
    wanted = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.requires_grad}
    if "residual" in wanted and wanted["residual"] is wanted.get("x"):
        del wanted["residual"]
    if not wanted:
        return Outcome(output)
    grads = torch.autograd.grad(output, list(wanted.values()), _output_grad(output, inputs.get("grad_layout")))
    return Outcome(output.detach(), dict(zip(wanted, grads)))


def _output_grad(output: Tensor, layout: str | None) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = list(output.shape)
    if layout == "expanded":
        shape = [1] * len(shape)
    elif layout == "transposed":
        shape = shape[::-1]
    grad = torch.randn(shape, generator=generator).bfloat16().to(output.dtype).to(output.device)
    if layout == "transposed":
        return grad.permute(*reversed(range(grad.dim())))
    return grad.expand_as(output)


def in_float64(inputs: Inputs) -> Inputs:
    """The same call with every tensor in float64: the rounded inputs of the kernel, exactly. Identity is kept."""
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return memo[id(value)]

    return {name: convert(value) for name, value in inputs.items()}


def judge(ours: Outcome, eager: Outcome, exact: Outcome) -> list[str]:
    """The failures of `ours`: every tensor whose error exceeds twice that of eager PyTorch plus a rounding floor.

    Errors are the largest absolute differences from `exact` (float64, on the rounded inputs); the floor is one unit
    in the last place of the largest exact element, in the dtype of the result, and 64 in float64, where eager is the
    oracle itself and only the order of summation differs. A result of zeros cannot pass, because a bound at or above
    the largest exact element is itself a failure.
    """
    failures = []
    floor = torch.finfo(eager.output.dtype).eps
    for (name, got), (_, same_dtype), (_, true) in zip(ours.items(), eager.items(), exact.items(), strict=True):
        if got.shape != true.shape or got.dtype != same_dtype.dtype:
            failures.append(f"{name}: got {got.dtype}{list(got.shape)}, wanted {same_dtype.dtype}{list(true.shape)}")
            continue
        if true.numel() == 0:
            continue
        largest = true.abs().max().item()
        ulps = 64 if got.dtype == torch.float64 else 1
        bound = 2 * _error(same_dtype, true) + ulps * max(torch.finfo(got.dtype).eps, floor) * largest
        error = _error(got, true)
        if not error <= bound:
            failures.append(f"{name}: error {error:.3g} exceeds {bound:.3g} (largest element {largest:.3g})")
        elif largest > 0 and bound >= largest:
            failures.append(f"{name}: vacuous, the bound {bound:.3g} would pass zeros (largest {largest:.3g})")
    return failures


def _error(value: Tensor, true: Tensor) -> float:
    return (value.double() - true).abs().max().item()


def check(case: Case, inputs: Inputs, fn: Callable[..., Tensor] | None = None, **options: Any) -> list[str]:
    """Run one call of a case through `fn` (the public op by default) and judge it against eager and float64."""
    ours = run(fn or case.fn, inputs, **options)
    eager = run(case.fn, inputs, impl="reference")
    exact = run(case.fn, in_float64(inputs), impl="reference")
    return judge(ours, eager, exact)


def _bottleneck_inputs(
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
    inputs: Inputs = {"x": _lay_out(x, sample.get("layout")), "w_down": tensor("w_down", (r, d), d**-0.5, own)}
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
    inputs["grad_layout"] = sample.get("grad_layout")
    return inputs


def _lay_out(x: Tensor, layout: str | None) -> Tensor:
    """The values of x in another memory layout: strided rows, a transpose, or every row the first one."""
    if layout is None:
        return x
    data = x.detach()
    if layout == "strided":
        data = torch.cat([data, data], -1)[..., : x.shape[-1]]
    elif layout == "transposed":
        data = data.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded":
        data = data[:1].expand_as(data)
    else:
        raise ValueError(f"layout must be strided, transposed or expanded, got {layout!r}")
    return data.requires_grad_(x.requires_grad)


def _bottleneck_samples() -> tuple[Mapping[str, Any], ...]:
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
    activations = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "identity")
    samples: list[dict[str, Any]] = [dict(id=f"{s['n']}x{s['d']}x{s['r']}", **s) for s in sizes]
    samples += [dict(id=f"act-{a}", n=37, d=96, r=24, activation=a) for a in activations]
    base = dict(n=19, d=48, r=5)
    every = ("x", "w_down", "b_down", "w_up", "b_up", "scale")
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
        "only-b_up": dict(frozen=("x", "w_down", "b_down", "w_up", "scale")),
        "only-scale": dict(frozen=every[:5], scale=("d_out",)),
        "only-residual": dict(frozen=every, residual="other"),
        "frozen-all": dict(frozen=every),
    }
    samples += [dict(base, id=name, **extra) for name, extra in options.items()]
    return tuple(samples)


def _bottleneck_cost(sample: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Forward: two GEMMs, x read and y written. Backward: four GEMMs, g and x read and dx written."""
    n, d, r = sample["n"], sample["d"], sample["r"]
    return (4 * n * d * r, 2 * n * d) if mode == "forward" else (12 * n * d * r, 5 * n * d)


CASES = [
    Case(
        name="bottleneck_adapter",
        fn=bottleneck_adapter,
        op=BOTTLENECK_ADAPTER,
        inputs=_bottleneck_inputs,
        samples=_bottleneck_samples(),
        typical=dict(id="typical", n=19, d=48, r=5, residual="other", scale=("d_out",)),
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
        cost=_bottleneck_cost,
    )
]
