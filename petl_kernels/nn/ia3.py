"""(IA)^3: a frozen linear with a trained factor for each output or each input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice
from petl_kernels.nn.channel_linear import freeze, plain_linear
from petl_kernels.nn.lora_merged import check_slices, parameters_of
from petl_kernels.ops._select import AUTO
from petl_kernels.ops.channel_scale import OP, channel_scale

SIDES = ("output", "input")


class IA3Linear(nn.Module):
    """`(x W^T + b) * l` or `(x * l) W^T + b`, with W and b frozen and l trained.

    Liu et al. 2022 (arXiv:2205.05638, section 3.3). They scale keys, values and the inner activations of feed-forward
    layers: side "output" behind the projections of keys and values, "input" before the second linear of a feed-forward
    layer, as peft does. Where that layer is gated, "output" behind the linear branch is the same, and is what the
    authors' code does. Of a fused projection, such as qkv, slices of the output are scaled. Starts as the linear
    itself: l is ones.

    Made by `from_linear`.

    Attributes:
        weight, bias: the linear's own Parameters, frozen, the weight [d_out, d_in] or, of a Conv1D, [d_in, d_out].
        scale: l, what trains, [d_out] or [d_in], or as long as the slices together; in the weight's dtype unless
            another was asked for.
        side: "output" or "input".
        slices: ((start, stop), ...) of the outputs that are scaled, or None for all.

    Parameters: d_out, d_in or the slices' length. state_dict keys `weight` and `bias` are those of the linear that it
    replaces.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        side: str = "output",
        slices: Sequence[tuple[int, int]] | None = None,
        impl: str | None = None,
        dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
    ) -> None:
        super().__init__()
        check_choice("IA3Linear", "side", side, SIDES)
        check_choice("IA3Linear", "impl", impl, (None, AUTO, *OP.impls))
        if slices is not None and side == "input":
            raise ValueError("IA3Linear: slices are of the output, so they must be None where side is 'input'")
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = weight.t().shape if fan_in_fan_out else weight.shape
        self.side, self.impl = side, impl
        self.slices = None if slices is None else check_slices("IA3Linear", slices, self.out_features)
        self.weight = weight
        self.register_parameter("bias", bias)
        size = self.in_features if side == "input" else self.out_features
        if self.slices is not None:
            size = sum(stop - start for start, stop in self.slices)
        self.scale = nn.Parameter(torch.empty(size, device=weight.device, dtype=dtype or weight.dtype))
        self.reset_parameters()
        freeze(weight, bias)  # once there is memory for all the rest

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> IA3Linear:
        """Put a vector of ones behind or before `linear`, whose weight and bias it shares and freezes.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same, or the Conv1D of `transformers` (GPT-2);
                on any device, "meta" included.
            side: "output" to scale what the linear returns, its bias included; "input" to scale what it is given.
            slices: (start, stop) of the outputs that are scaled, such as ((d, 3 * d),) for keys and values; None for
                all. None may overlap, and in whatever order they are given, their factors are in ascending order.
            impl: passed on to `petl_kernels.channel_scale`.
            dtype: of the vector; None for the weight's.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is no plain floating-point
                Parameter.
            ValueError: side, slices or impl outside the above.
        """
        weight, bias, transposed = parameters_of("IA3Linear", linear)
        return cls(weight, bias, fan_in_fan_out=transposed, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the linear itself."""
        self.scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.side == "input":
            return F.linear(channel_scale(x, self.scale, impl=self.impl), weight, self.bias)
        return channel_scale(F.linear(x, weight, self.bias), self._factors(), impl=self.impl)

    def _factors(self) -> Tensor:
        """One for each output, ones outside of the slices: a pass over all of y, where a part of it would be copied."""
        if self.slices is None:
            return self.scale
        parts, end, at = [], 0, 0
        for start, stop in self.slices:
            parts += [self.scale.new_ones(start - end), self.scale[at : at + stop - start]]
            end, at = stop, at + stop - start
        return torch.cat([*parts, self.scale.new_ones(self.out_features - end)])

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the vector multiplied into the weight, and into the bias of an output, in float64.

        Each element is rounded once. The layer stays as it is. The copies are frozen if what they copy is.
        """
        factors = (self.scale if self.side == "input" else self._factors()).double()
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        weight = weight * (factors if self.side == "input" else factors[:, None])
        bias = None if self.bias is None or self.side == "input" else self.bias * factors
        return plain_linear(self, weight, bias)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, side={self.side!r}, bias={self.bias is not None}"
        text += "" if self.slices is None else f", slices={self.slices}"
        return text if self.impl is None else f"{text}, impl={self.impl!r}"
