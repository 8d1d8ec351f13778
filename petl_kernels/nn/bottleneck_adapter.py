"""The bottleneck adapter as a module: Houlsby's sequential form and the parallel form of He et al."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_probability, check_size
from petl_kernels.ops.bottleneck_adapter import OP, bottleneck_adapter
from petl_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS


def _houlsby(w_down: Tensor, w_up: Tensor) -> None:
    for weight in (w_down, w_up):
        nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)


def _bert(w_down: Tensor, w_up: Tensor) -> None:
    for weight in (w_down, w_up):
        nn.init.normal_(weight, std=0.02)


def _lora(w_down: Tensor, w_up: Tensor) -> None:
    nn.init.kaiming_uniform_(w_down, a=math.sqrt(5))
    nn.init.zeros_(w_up)


INITS: dict[str, Callable[[Tensor, Tensor], None]] = {"houlsby": _houlsby, "bert": _bert, "lora": _lora}
FORMS = ("sequential", "parallel")
LEARNED_SCALES = ("learned", "channel")


class BottleneckAdapter(nn.Module):
    """`residual + scale * (act(x w_down^T + b_down) w_up^T + b_up)` with trainable projections.

    Args:
        d_model: width d of the input and the output.
        bottleneck: width r between the projections.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "identity" or
            "softmax" (over the bottleneck). Houlsby et al. used "gelu_tanh", He et al. "relu".
        scale: a float; "learned" for one trained scalar [1]; "channel" for one per channel [d]. Both start at 1.
        form: "sequential", where the residual is the input itself (Houlsby et al. 2019, arXiv:1902.00751, section
            2.1), or "parallel", where it is the output of the sub-layer beside which the adapter runs (He et al. 2021,
            arXiv:2110.04366, table 1).
        init: of the two weights; biases start at 0.
            "houlsby": normal of std 1e-2 cut at two of them (arXiv:1902.00751, section 3.6; their code has 1e-3).
            "bert": normal of std 0.02, as He et al. initialise sequential adapters.
            "lora": Kaiming uniform (a = sqrt 5) below and zero above, so that the adapter starts as the identity, as
            He et al. initialise parallel ones.
        bias: whether the projections have biases.
        dropout: probability of dropping an element of the bottleneck, after the activation, in training.
        impl: passed on to `petl_kernels.bottleneck_adapter`.
        device, dtype: of the parameters; "meta" defers memory until `to_empty` and `reset_parameters`.

    Shapes: x [..., d] -> [..., d]; w_down [r, d], b_down [r], w_up [d, r], b_up [d]; scale a float, [1] or [d].

    Raises:
        ValueError: an argument outside the above.
    """

    b_down: Tensor | None
    b_up: Tensor | None

    def __init__(
        self,
        d_model: int,
        bottleneck: int,
        *,
        activation: str = "gelu",
        scale: float | str = 1.0,
        form: str = "sequential",
        init: str = "houlsby",
        bias: bool = True,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("BottleneckAdapter", "d_model", d_model)
        check_size("BottleneckAdapter", "bottleneck", bottleneck)
        check_choice("BottleneckAdapter", "activation", activation, tuple(ACTIVATIONS))
        check_choice("BottleneckAdapter", "form", form, FORMS)
        check_choice("BottleneckAdapter", "init", init, tuple(INITS))
        check_choice("BottleneckAdapter", "impl", impl, (None, "auto", *OP.impls))
        check_probability("BottleneckAdapter", "dropout", dropout)
        if isinstance(scale, (str, bool)) or not isinstance(scale, (int, float)):
            check_choice("BottleneckAdapter", "scale", scale, LEARNED_SCALES, "a float or ")
        self.d_model, self.bottleneck = d_model, bottleneck
        self.activation, self.form, self.init, self.impl = activation, form, init, impl
        self.dropout = float(dropout)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_down, self.w_up = parameter(bottleneck, d_model), parameter(d_model, bottleneck)
        self.register_parameter("b_down", parameter(bottleneck) if bias else None)
        self.register_parameter("b_up", parameter(d_model) if bias else None)
        self.scale: float | Tensor
        if isinstance(scale, str):
            self.scale = parameter(1 if scale == "learned" else d_model)
        else:
            self.scale = float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights by `init`, set biases to 0 and a learned scale to 1."""
        INITS[self.init](self.w_down, self.w_up)
        for bias in (self.b_down, self.b_up):
            if bias is not None:
                bias.zero_()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adapt x [..., d].

        Args:
            x: the input, [..., d].
            residual: what a parallel adapter is added to, [..., d]; None gives the bare branch. A sequential adapter
                adds x itself and takes none.

        Raises:
            ValueError: a residual for a sequential adapter, and what `petl_kernels.bottleneck_adapter` raises.
        """
        if self.form == "sequential":
            if residual is not None:
                raise ValueError("BottleneckAdapter: residual must be None in the sequential form, which adds x itself")
            residual = x
        return self._adapt(x, residual)

    def _adapt(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The branch of x added to any residual, or by itself."""
        return bottleneck_adapter(
            x,
            self.w_down,
            self.b_down,
            self.w_up,
            self.b_up,
            residual=residual,
            activation=self.activation,
            scale=self.scale,
            gate=self._gate(x),
            dropout=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    def _gate(self, x: Tensor) -> Tensor | None:
        """A factor of the branch per row of x, None for 1."""
        return None

    def extra_repr(self) -> str:
        scale: Any = self.scale
        if isinstance(scale, Tensor):
            scale = "learned" if scale.shape == (1,) else "channel"
        text = f"{self.d_model}, {self.bottleneck}, activation={self.activation!r}, scale={scale!r}"
        text += f", form={self.form!r}, init={self.init!r}, bias={self.b_down is not None}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text if self.impl is None else f"{text}, impl={self.impl!r}"
