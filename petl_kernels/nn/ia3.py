"""(IA)^3: a frozen linear with a trained factor for each output or each input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice
from petl_kernels.nn.channel_linear import freeze, plain_linear, weight_and_bias
from petl_kernels.ops._select import AUTO
from petl_kernels.ops.channel_scale import OP, channel_scale

SIDES = ("output", "input")


class IA3Linear(nn.Module):
    """`(x W^T + b) * l` or `(x * l) W^T + b`, with W and b frozen and l trained.

    Liu et al. 2022 (arXiv:2205.05638, section 3.3). They scale keys, values and the inner activations of feed-forward
    layers: side "output" behind the projections of keys and values, "input" before the second linear of a feed-forward
    layer, as peft does. Where that layer is gated, "output" behind the linear branch is the same, and is what the
    authors' code does. Starts as the linear itself: l is ones.

    Made by `from_linear`.

    Attributes:
        weight, bias: the linear's own Parameters, frozen.
        scale: l, what trains, [d_out] or [d_in], in the weight's dtype unless another was asked for.
        side: "output" or "input".

    Parameters: d_out or d_in. state_dict keys `weight` and `bias` are those of the linear that it replaces.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        side: str = "output",
        impl: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("IA3Linear", "side", side, SIDES)
        check_choice("IA3Linear", "impl", impl, (None, AUTO, *OP.impls))
        self.out_features, self.in_features = weight.shape
        self.side, self.impl = side, impl
        self.weight = freeze(weight)
        self.register_parameter("bias", None if bias is None else freeze(bias))
        size = weight.shape[SIDES.index(side)]
        self.scale = nn.Parameter(torch.empty(size, device=weight.device, dtype=dtype or weight.dtype))
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> IA3Linear:
        """Put a vector of ones behind or before `linear`, whose weight and bias it shares and freezes.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same; on any device, "meta" included.
            side: "output" to scale what the linear returns, its bias included; "input" to scale what it is given.
            impl: passed on to `petl_kernels.channel_scale`.
            dtype: of the vector; None for the weight's.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is no plain floating-point
                Parameter.
            ValueError: side or impl outside the above.
        """
        return cls(*weight_and_bias("IA3Linear", linear), **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the linear itself."""
        self.scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        if self.side == "input":
            return F.linear(channel_scale(x, self.scale, impl=self.impl), self.weight, self.bias)
        return channel_scale(F.linear(x, self.weight, self.bias), self.scale, impl=self.impl)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the vector multiplied into the weight, and into the bias of an output, in float64.

        Each element is rounded once. The layer stays as it is. The copies are frozen if what they copy is.
        """
        factors = self.scale.double()
        weight = self.weight * (factors if self.side == "input" else factors[:, None])
        bias = None if self.bias is None or self.side == "input" else self.bias * factors
        return plain_linear(self, weight, bias)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, side={self.side!r}, bias={self.bias is not None}"
        return text if self.impl is None else f"{text}, impl={self.impl!r}"
