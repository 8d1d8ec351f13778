"""LoRA: a frozen linear with a trained low-rank branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_number, check_probability, check_size
from petl_kernels.nn.bottleneck_adapter import INITS
from petl_kernels.nn.channel_linear import freeze, plain_linear, weight_and_bias
from petl_kernels.ops._select import AUTO
from petl_kernels.ops.bottleneck_adapter import OP, bottleneck_adapter


class LoRALinear(nn.Module):
    """`x W^T + b + (alpha / rank) dropout(x) w_down^T w_up^T`, with W and b frozen.

    Hu et al. 2021 (arXiv:2106.09685, equation 3). The dense product is the linear's own; the low-rank branch is one
    call of `petl_kernels.bottleneck_adapter` with the dense product as its residual, so that neither
    `x w_down^T w_up^T` nor its scaled copy is ever stored.
    Starts as the linear itself: w_down Kaiming uniform (a = sqrt 5), w_up zero.

    Made by `from_linear`.

    Attributes:
        weight, bias: the linear's own Parameters, frozen.
        w_down, w_up: what trains, [rank, d_in] and [d_out, rank], in the weight's dtype unless another was asked for.

    Parameters: rank (d_in + d_out). state_dict keys `weight` and `bias` are those of the linear that it replaces.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        impl: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("LoRALinear", "rank", rank)
        check_probability("LoRALinear", "dropout", dropout)
        check_choice("LoRALinear", "impl", impl, (None, AUTO, *OP.impls))
        if alpha is not None:
            check_number("LoRALinear", "alpha", alpha, "None or ")
        self.out_features, self.in_features = weight.shape
        self.rank, self.dropout, self.impl = rank, float(dropout), impl
        self.alpha = float(rank if alpha is None else alpha)
        self.weight = weight
        self.register_parameter("bias", bias)
        dtype = dtype or weight.dtype
        self.w_down = nn.Parameter(torch.empty(rank, self.in_features, device=weight.device, dtype=dtype))
        self.w_up = nn.Parameter(torch.empty(self.out_features, rank, device=weight.device, dtype=dtype))
        self.reset_parameters()
        freeze(weight, bias)  # once there is memory for all the rest

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, **options: Any) -> LoRALinear:
        """Put a low-rank branch beside `linear`, whose weight and bias it shares and freezes.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same; on any device, "meta" included.
            rank: r, from 1 up.
            alpha: the branch is multiplied by alpha / rank; None for rank, which makes that 1.
            dropout: of x on its way into the branch, in training.
            impl: passed on to `petl_kernels.bottleneck_adapter`.
            dtype: of what trains; None for the weight's.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is no plain floating-point
                Parameter.
            ValueError: rank, alpha, dropout or impl outside the above.
        """
        return cls(*weight_and_bias("LoRALinear", linear), rank, **options)

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
        return bottleneck_adapter(
            F.dropout(x, self.dropout, self.training),
            self.w_down,
            None,
            self.w_up,
            None,
            residual=F.linear(x, self.weight, self.bias),
            activation="identity",
            scale=self.scale,
            impl=self.impl,
        )

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with `W + scale w_up w_down`, computed in float64 and rounded once.

        The layer stays as it is: to unmerge exactly, put it back. The copy is frozen if `weight` is.
        """
        return plain_linear(self, self.weight.double() + self.scale * (self.w_up.double() @ self.w_down.double()))

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha:g}"
        text += f", bias={self.bias is not None}" + (f", dropout={self.dropout}" if self.dropout else "")
        return text if self.impl is None else f"{text}, impl={self.impl!r}"
