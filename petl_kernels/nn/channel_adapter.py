"""The salient-channel module of SCT: a square linear layer on chosen channels, with a residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_size
from petl_kernels.ops.channel_adapter import OP, channel_adapter


class ChannelAdapter(nn.Module):
    """`y_C = x_C + scale * (x_C weight^T + bias)` on the chosen channels C; the others pass as they are.

    SCT, Zhao et al. 2023 (arXiv:2309.08513), places one after the attention of every block, on the residual stream
    (`x + attn(norm(x))`), with the K = d / 8 channels of largest norm, and trains nothing else but the head.

    Args:
        d_model: width d of the input and the output.
        channels: the k distinct channels to transform, in any order: integers, or an int64 tensor [k].
        scale: a float, or "learned" for one trained scalar [1] that starts at 1.
        scale_input: `y_C = scale * x_C + (x_C weight^T + bias)` instead, the other mode of SCT's code.
        bias: whether the linear layer has one.
        impl: passed on to `petl_kernels.channel_adapter`.
        device, dtype: of the parameters; "meta" defers memory until `to_empty` and `reset_parameters`.

    Shapes: x [..., d] -> [..., d]; channels int64 [k], a buffer; weight [k, k], bias [k]; scale a float or [1].

    Raises:
        ValueError: an argument outside the above.
    """

    bias: Tensor | None
    channels: Tensor

    def __init__(
        self,
        d_model: int,
        channels: Tensor | Sequence[int],
        *,
        scale: float | str = 1.0,
        scale_input: bool = False,
        bias: bool = True,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("ChannelAdapter", "d_model", d_model)
        if isinstance(scale, bool) or not (isinstance(scale, (int, float)) or scale == "learned"):
            raise ValueError(f"ChannelAdapter: scale must be a float or 'learned', got {scale!r}")
        check_choice("ChannelAdapter", "impl", impl, (None, "auto", *OP.impls))
        self.d_model, self.scale_input, self.impl = d_model, bool(scale_input), impl
        # Kept beside the buffer, whose values a construction on "meta" cannot hold.
        self._chosen = _checked(channels, d_model)
        k = len(self._chosen)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.register_buffer("channels", torch.empty(k, dtype=torch.int64, device=device))
        self.weight = parameter(k, k)
        self.register_parameter("bias", parameter(k) if bias else None)
        self.scale: float | Tensor = parameter(1) if isinstance(scale, str) else float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As SCT starts: weight normal of std 0.02 (cut at 2, as timm does), bias 0; a learned scale 1.

        The channels become those of the construction.
        """
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            self.bias.zero_()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(1.0)
        self.channels.copy_(torch.tensor(self._chosen, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Transform the chosen channels of x [..., d]; raises what `petl_kernels.channel_adapter` raises."""
        return channel_adapter(
            x,
            self.channels,
            self.weight,
            self.bias,
            scale=self.scale,
            scale_input=self.scale_input,
            impl=self.impl,
        )

    @torch.no_grad()
    def merge(self, linear: nn.Linear) -> nn.Linear:
        """`linear` followed by this module as one plain linear layer: weight T W, bias T b + e.

        With E the columns of the identity at `channels`, T = I + s E A E^T and e = s E a (or, with `scale_input`,
        T_CC = s I + A and e = E a), A and a being this module's weight and bias. It serves where the module reads the
        output of a linear layer (SCT's placements after the MLP's second layer and on q and v), not on a residual
        stream. Computed in float64 and rounded once; rows outside `channels` keep their bits.

        Args:
            linear: an `nn.Linear` itself, no subclass (quantised, adapted), [in] -> [d].

        Returns:
            A new layer on the device, in the dtype and with the `requires_grad` of the given one, which is unchanged.
            It has a bias if either has.

        Raises:
            TypeError: not an `nn.Linear`.
            ValueError: its output is not d wide, or it is on another device.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"ChannelAdapter: linear must be a plain nn.Linear, got {type(linear).__name__}")
        if linear.out_features != self.d_model:
            wanted = f"must have out_features = d_model = {self.d_model}"
            raise ValueError(f"ChannelAdapter: linear {wanted}, got {linear.out_features}")
        old = linear.weight
        if old.device != self.weight.device:
            raise ValueError(f"ChannelAdapter: linear must be on {self.weight.device}, got {old.device}")
        biased = linear.bias is not None or self.bias is not None
        merged = nn.Linear(linear.in_features, self.d_model, biased, device=old.device, dtype=old.dtype)
        merged.weight.copy_(old)
        merged.weight[self.channels] = self._transformed(old).to(old.dtype)
        merged.weight.requires_grad_(old.requires_grad)
        if biased:
            bias = torch.zeros_like(merged.bias) if linear.bias is None else linear.bias
            merged.bias.copy_(bias)
            merged.bias[self.channels] = self._transformed(bias, self.bias).to(bias.dtype)
            merged.bias.requires_grad_(old.requires_grad if linear.bias is None else linear.bias.requires_grad)
        return merged.train(linear.training)

    def _transformed(self, value: Tensor, added: Tensor | None = None) -> Tensor:
        """Rows `channels` of T value + e in float64, e being made of `added`."""
        chosen, scale = value[self.channels].double(), self.scale
        s = scale.double() if isinstance(scale, Tensor) else scale
        u = self.weight.double() @ chosen
        if added is not None:
            u = u + added.double()
        return s * chosen + u if self.scale_input else chosen + s * u

    def extra_repr(self) -> str:
        scale = "'learned'" if isinstance(self.scale, Tensor) else self.scale
        text = f"{self.d_model}, k={len(self._chosen)}, scale={scale}, scale_input={self.scale_input}"
        text += f", bias={self.bias is not None}"
        return text if self.impl is None else f"{text}, impl={self.impl!r}"


def _checked(channels: Any, d_model: int) -> tuple[int, ...]:
    """The values of `channels`, distinct and in [0, d_model)."""
    if isinstance(channels, Tensor):
        if channels.dtype != torch.int64 or channels.dim() != 1 or channels.is_meta:
            got = f"{channels.dtype} {list(channels.shape)} on {channels.device}"
            raise ValueError(f"ChannelAdapter: channels must be int64 [k] with values, got {got}")
        channels = channels.tolist()
    values = tuple(channels)
    if wrong := [c for c in values if type(c) is not int or not 0 <= c < d_model]:
        raise ValueError(f"ChannelAdapter: channels must be integers in [0, {d_model}), got {wrong[0]!r}")
    if len(set(values)) < len(values):
        twice = next(c for c in values if values.count(c) > 1)
        raise ValueError(f"ChannelAdapter: channels must be distinct, got {twice} more than once")
    return values
