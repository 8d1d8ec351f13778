"""What an entry of the table says of an op, and the rule by which an implementation is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._op import Op

Inputs = dict[str, Any]
DRAWS = 32


@dataclass(frozen=True)
class Case:
    """One op: what to call, with which inputs, and what it costs.

    Attributes:
        name: the op's name.
        fn: the public function; takes `impl=`.
        op: its `Op`, which knows the implementations.
        inputs: `(sample, dtype, parameter_dtype, device, seed) -> keyword arguments of fn`.
        samples: the calls to test, each a mapping that `inputs` understands; "id" names it.
        typical: a small call in which every tensor argument is given and all that can train does; "n" counts its rows.
        variants: options that, over `typical`, make other such calls; mixed dtypes, autocast and gradcheck go through
            all of them.
        tiny: sizes that, over `typical`, make a call small enough for numerical gradients.
        bench: the calls to time; their integers, in order, are the shape on the benchmark's command line.
        host: a call so small that its time is what Python and the dispatcher cost.
        cost: `(sample, mode) -> (flops, ideal elements moved)`; mode is "forward", "backward" or "full" (both).
        baselines: what else is timed beside eager and torch.compile: functions of the same arguments, without `impl`.
    """

    name: str
    fn: Callable[..., Tensor]
    op: Op
    inputs: Callable[..., Inputs]
    samples: tuple[Mapping[str, Any], ...]
    typical: Mapping[str, Any]
    tiny: Mapping[str, Any]
    bench: tuple[Mapping[str, Any], ...]
    host: Mapping[str, Any]
    cost: Callable[[Mapping[str, Any], str], tuple[int, int]]
    variants: tuple[Mapping[str, Any], ...] = ()
    baselines: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    @property
    def differentiable(self) -> bool:
        """Whether the op has a backward."""
        return "backward" in self.op.directions


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
    """The same call with what floats in float64: the rounded inputs of the kernel, exactly. Identity is kept."""
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return memo[id(value)]

    return {name: convert(value) for name, value in inputs.items()}


@dataclass(frozen=True)
class Error:
    """The largest absolute differences of one tensor from float64 on the rounded inputs: the kernel's and eager's.

    `floor` is one unit in the last place of the largest exact element, in the coarser of the tensor's dtype and the
    output's; 64 in float64, where eager is the oracle itself and only the order of summation differs.
    """

    name: str
    ours: float
    eager: float
    floor: float
    largest: float

    @property
    def bound(self) -> float:
        """What the kernel's error may be."""
        return 2 * self.eager + self.floor


def errors(ours: Outcome, eager: Outcome, exact: Outcome) -> list[Error]:
    """The error of every tensor that has elements."""
    found = []
    coarsest = torch.finfo(eager.output.dtype)
    for (name, got), (_, same_dtype), (_, true) in zip(ours.items(), eager.items(), exact.items(), strict=True):
        if true.numel():
            largest, ulps = true.abs().max().item(), 64 if got.dtype == torch.float64 else 1
            own = torch.finfo(got.dtype)  # below the smallest normal number units in the last place stay as large
            floor = ulps * max(own.eps, coarsest.eps) * max(largest, own.tiny, coarsest.tiny)
            found.append(Error(name, _error(got, true), _error(same_dtype, true), floor, largest))
    return found


def mean_errors(ours: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]) -> list[Error]:
    """The errors of every tensor, each number averaged over several draws."""
    found = []
    for draws in zip(*map(errors, ours, eager, exact), strict=True):
        numbers = zip(*((e.ours, e.eager, e.floor, e.largest) for e in draws))
        found.append(Error(draws[0].name, *(sum(column) / len(draws) for column in numbers)))
    return found


def judge(ours: Outcome, eager: Outcome, exact: Outcome) -> list[str]:
    """The failures of `ours`: every tensor whose error exceeds twice that of eager PyTorch plus a rounding floor.

    A result of zeros cannot pass, because a bound at or above the largest exact element is itself a failure.
    """
    return judge_draws([ours], [eager], [exact])


def judge_draws(ours: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]) -> list[str]:
    """The rule of `judge` on what several draws of a call's inputs have in common: on the means of its numbers."""
    for got, same_dtype, true in zip(ours, eager, exact, strict=True):
        if failures := _misshapen(got, same_dtype, true):
            return failures
    failures = []
    for e in mean_errors(ours, eager, exact):
        if not e.ours <= e.bound:
            failures.append(f"{e.name}: error {e.ours:.3g} exceeds {e.bound:.3g} (largest element {e.largest:.3g})")
        elif e.largest > 0 and e.bound >= e.largest:
            failures.append(f"{e.name}: vacuous, the bound {e.bound:.3g} would pass zeros (largest {e.largest:.3g})")
    return failures


def _misshapen(ours: Outcome, eager: Outcome, exact: Outcome) -> list[str]:
    return [
        f"{name}: got {got.dtype}{list(got.shape)}, wanted {same_dtype.dtype}{list(true.shape)}"
        for (name, got), (_, same_dtype), (_, true) in zip(ours.items(), eager.items(), exact.items(), strict=True)
        if got.shape != true.shape or got.dtype != same_dtype.dtype
    ]


def _error(value: Tensor, true: Tensor) -> float:
    return (value.double() - true).abs().max().item()


def check(case: Case, inputs: Inputs, fn: Callable[..., Tensor] | None = None, **options: Any) -> list[str]:
    """Run one call of a case through `fn` (the public op by default) and judge it against eager and float64."""
    return judge(*_outcomes(case, inputs, fn, options))


def check_draws(
    case: Case, draw: Callable[[int], Inputs], fn: Callable[..., Tensor] | None = None, first: int = 0, **options: Any
) -> list[str]:
    """`check` of `draw(first)`, inputs of a seed; where it fails, the verdict of `judge_draws` on `DRAWS` seeds.

    The error of a tensor of one element, as the gradient of a scalar scale is, is one draw from a distribution about
    zero: of two such from the same normal distribution, one is over twice the other in 30 % of all cases, of means of
    32 in one of 5,000.
    """
    if not check(case, draw(first), fn, **options):
        return []
    return judge_draws(*zip(*(_outcomes(case, draw(seed), fn, options) for seed in range(first, first + DRAWS))))


def _outcomes(
    case: Case, inputs: Inputs, fn: Callable[..., Tensor] | None, options: Mapping[str, Any]
) -> tuple[Outcome, Outcome, Outcome]:
    ours = run(fn or case.fn, inputs, **options)
    eager = run(case.fn, inputs, impl="reference")
    return ours, eager, run(case.fn, in_float64(inputs), impl="reference")


def lay_out(x: Tensor, layout: str | None) -> Tensor:
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
