"""LoRA on slices of a fused projection: one frozen linear, several outputs, a low-rank branch for each of some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_number, check_probability, check_size
from petl_kernels.nn.bottleneck_adapter import INITS
from petl_kernels.nn.channel_linear import freeze, plain_linear, weight_and_bias
from petl_kernels.ops._op import REFERENCE, opaque
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._select import AUTO, asked_for
from petl_kernels.ops._validate import autocast

Slices = tuple[tuple[int, int], ...]


class LoRAMergedLinear(nn.Module):
    """`x W^T + b`, to slices of which `(alpha / rank) dropout(x) A_i^T B_i^T` is added, with W and b frozen.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3) on, say, queries and values of a fused qkv projection: the
    `MergedLinear` of the authors' code, without its zero-padded update. x is read by one stacked down-projection, and
    each branch is accumulated in its slice of the dense product in place: no launch copies, pads or adds [N, d_out].
    Forward 2 + n launches for n slices, backward 3 + 2 n; dropout 1 and 2 more. Differentiable once.
    Starts as the linear itself: A Kaiming uniform (a = sqrt 5), B zero.

    Made by `from_linear`.

    Attributes:
        weight, bias: the linear's own Parameters, frozen, the weight [d_out, d_in] or, of a Conv1D, [d_in, d_out].
        slices: ((start, stop), ...) of the outputs that have a branch.
        w_down: all A_i, one above the other, [n rank, d_in].
        w_up: all B_i, one above the other, [total length of the slices, rank].

    w_down and w_up are what trains, in the weight's dtype unless another was asked for: `lora_A` and `lora_B` of
    `MergedLinear`. Parameters: rank (n d_in + total length). state_dict keys `weight` and `bias` are those of the
    linear that it replaces.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rank: int,
        slices: Sequence[tuple[int, int]],
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        impl: str | None = None,
        dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
    ) -> None:
        super().__init__()
        check_size("LoRAMergedLinear", "rank", rank)
        check_probability("LoRAMergedLinear", "dropout", dropout)
        check_choice("LoRAMergedLinear", "impl", impl, (None, AUTO, REFERENCE))
        if alpha is not None:
            check_number("LoRAMergedLinear", "alpha", alpha, "None or ")
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = weight.t().shape if fan_in_fan_out else weight.shape
        self.slices = check_slices("LoRAMergedLinear", slices, self.out_features)
        self.rank, self.dropout, self.impl = rank, float(dropout), impl
        self.alpha = float(rank if alpha is None else alpha)
        self.weight = weight
        self.register_parameter("bias", bias)
        device, dtype = weight.device, dtype or weight.dtype
        length = sum(stop - start for start, stop in self.slices)
        self.w_down = nn.Parameter(torch.empty(rank * len(self.slices), self.in_features, device=device, dtype=dtype))
        self.w_up = nn.Parameter(torch.empty(length, rank, device=device, dtype=dtype))
        self.reset_parameters()
        freeze(weight, bias)  # once there is memory for all the rest

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int, slices: Sequence[tuple[int, int]], **options: Any
    ) -> LoRAMergedLinear:
        """Put low-rank branches beside `linear`, whose weight and bias it shares and freezes.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same, or the Conv1D of `transformers` (GPT-2);
                on any device, "meta" included.
            rank: r of each branch, from 1 up.
            slices: (start, stop) of the outputs that get a branch, such as ((0, d), (2 * d, 3 * d)) for queries and
                values; none may overlap. In whatever order they are given, their parameters are in ascending order.
            alpha: the branches are multiplied by alpha / rank; None for rank, which makes that 1.
            dropout: of x on its way into the branches, in training; they share one draw.
            impl: "reference" for plain PyTorch operators, which torch.func and double backward can look into; None
                for the in-place sums, and the reference where only that is possible.
            dtype: of what trains; None for the weight's.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is no plain floating-point
                Parameter.
            ValueError: rank, slices, alpha, dropout or impl outside the above.
        """
        weight, bias, transposed = parameters_of("LoRAMergedLinear", linear)
        return cls(weight, bias, rank, slices, fan_in_fan_out=transposed, **options)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the linear itself."""
        INITS["lora"](self.w_down, self.w_up)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        dropout = self.dropout if self.training else 0.0
        return add_branches(x, weight, self.bias, self.w_down, self.w_up, self.slices, self.scale, dropout, self.impl)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with `W + scale B_i A_i` in the rows of each slice, in float64 and rounded once.

        The layer stays as it is: to unmerge exactly, put it back. The copy is frozen if `weight` is.
        """
        merged = (self.weight.t() if self.fan_in_fan_out else self.weight).to(torch.float64, copy=True)
        for outputs, branch, rows in _branches(self.slices, self.rank):
            merged[outputs] += self.scale * (self.w_up[rows].double() @ self.w_down[branch].double())
        return plain_linear(self, merged.contiguous())

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, rank={self.rank}, slices={self.slices}, alpha={self.alpha:g}"
        text += f", bias={self.bias is not None}" + (f", dropout={self.dropout}" if self.dropout else "")
        return text if self.impl is None else f"{text}, impl={self.impl!r}"


def add_branches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    slices: Slices,
    scale: float,
    dropout: float,
    impl: str | None,
) -> Tensor:
    """`x W^T + b` with a branch added to each of these slices of it; arguments as the attributes of the layer."""
    x = autocast(x)
    call = (x, F.dropout(x, dropout) if dropout else None, weight, bias, w_down, w_up)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)  # unfrozen again
    if trains or asked_for(impl) == REFERENCE or opaque(call):
        return _reference(*call, slices, scale)
    return _Branches.apply(*call, slices, scale)


def is_conv1d(module: Any) -> bool:
    """Whether it is the linear with a transposed weight that GPT-2 of `transformers` is made of."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and "weight" in module._parameters


def parameters_of(owner: str, linear: Any) -> tuple[nn.Parameter, nn.Parameter | None, bool]:
    """Weight and bias of a linear that the layer `owner` takes over, and whether the weight is transposed."""
    if not is_conv1d(linear):
        return *weight_and_bias(owner, linear), False
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    return weight, bias, True


def check_slices(owner: str, slices: Any, size: int) -> Slices:
    """The checked slices, in ascending order."""
    try:
        pairs = sorted((start, stop) for start, stop in slices)
    except (TypeError, ValueError):
        pairs = []
    end, ok = 0, bool(pairs)
    for start, stop in pairs:
        ok = ok and type(start) is type(stop) is int and end <= start < stop <= size
        end = stop
    if not ok:
        wanted = f"slices must be pairs 0 <= start < stop <= {size} of integers that do not overlap"
        raise ValueError(f"{owner}: {wanted}, got {slices!r}")
    return tuple(pairs)


def _branches(slices: Slices, rank: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of each branch: its outputs, its part of the bottlenecks (rows of w_down), and its rows of w_up."""
    row = 0
    for i, (start, stop) in enumerate(slices):
        yield slice(start, stop), slice(i * rank, (i + 1) * rank), slice(row, row + stop - start)
        row += stop - start


def _reference(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    slices: Slices,
    scale: float,
) -> Tensor:
    """The specification: plain, differentiable PyTorch."""
    y = F.linear(x, weight, bias)
    into = x if dropped is None else dropped
    down, up = w_down.to(x.dtype), w_up.to(x.dtype)
    parts, end = [], 0
    for outputs, branch, rows in _branches(slices, w_up.shape[1]):
        update = F.linear(F.linear(into, down[branch]), up[rows])
        parts += [y[..., end : outputs.start], y[..., outputs] + scale * update]
        end = outputs.stop
    return torch.cat([*parts, y[..., end:]], -1)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped, weight, bias, w_down, w_up, slices, scale):
        into = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        z, up = into @ w_down.to(x.dtype).t(), w_up.to(x.dtype)
        for outputs, branch, rows in _branches(slices, w_up.shape[1]):
            y[:, outputs].addmm_(z[:, branch], up[rows].t(), alpha=scale)
        _, _, _, _, down_trains, up_trains, *_ = ctx.needs_input_grad
        ctx.save_for_backward(into if down_trains else None, z if up_trains else None, weight, w_down, w_up)
        ctx.slices, ctx.scale, ctx.shape = slices, scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once("LoRAMergedLinear", lambda: _gradients(ctx, g, *saved), (g, *saved))
        return grads[0], grads[1], None, None, grads[2], grads[3], None, None


def _gradients(
    ctx: Any, g: Tensor, into: Tensor | None, z: Tensor | None, weight: Tensor, w_down: Tensor, w_up: Tensor
) -> list[Tensor | None]:
    """The gradients of x, of x after dropout, w_down and w_up, None where not needed."""
    of_x, of_dropped, _, _, of_down, of_up, *_ = ctx.needs_input_grad
    g, down, up = g.reshape(-1, g.shape[-1]), w_down.to(g.dtype), w_up.to(g.dtype)
    dx = ddropped = ddown = dup = dz = None
    if of_x or of_dropped or of_down:
        dz = g.new_empty((g.shape[0], down.shape[0]))
    if of_up:
        dup = torch.empty_like(up)
    for outputs, branch, rows in _branches(ctx.slices, up.shape[1]):
        part = g[:, outputs]
        if dz is not None:  # beta=0: what the memory holds is not read
            dz[:, branch].addmm_(part, up[rows], beta=0, alpha=ctx.scale)
        if dup is not None and z is not None:
            dup[rows].addmm_(part.t(), z[:, branch], beta=0, alpha=ctx.scale)
    if of_x:
        dx = g @ weight.to(g.dtype)
        if not of_dropped and dz is not None:
            dx.addmm_(dz, down)
        dx = dx.view(ctx.shape)
    if of_dropped and dz is not None:
        ddropped = (dz @ down).view(ctx.shape)
    if of_down and dz is not None and into is not None:
        ddown = (dz.t() @ into).to(w_down.dtype)
    return [dx, ddropped, ddown, None if dup is None else dup.to(w_up.dtype)]
