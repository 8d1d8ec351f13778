"""A frozen linear of which a few output rows or input columns are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from petl_kernels.nn._check import check_choice
from petl_kernels.nn._sharded import write_shard
from petl_kernels.ops._select import AUTO
from petl_kernels.ops._validate import check_channels
from petl_kernels.ops.channel_linear import OP, channel_linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ChannelLinear(nn.Module):
    """`x W'^T + b'`, where W' and b' are a frozen weight and bias with some channels replaced by trained ones.

    Made by `from_linear`; semantics in `petl_kernels.channel_linear`. Only `channel_weight` and `channel_bias` train:
    gradients, optimizer state, clipping and all-reduce see these compact tensors, and nothing else can move.

    Attributes:
        weight, bias: the linear's own Parameters, [d_out, d_in] and [d_out] or None, frozen. The kernels write the
            trained channels into them in place at every call; the reference does not. `sync_` does it at any time.
        channels: int64 [k], in the order that was given; a buffer.
        channel_weight: the trained rows [k, d_in] (dim=0) or columns [d_out, k] (dim=1).
        channel_bias: the trained entries of the bias, [k], or None.

    state_dict holds these five. `weight` and `bias` are brought up to date first, so that they may be loaded into a
    plain nn.Linear. On loading, the trained channels are the master: they overwrite what `weight` and `bias` brought.
    A k that differs is torch's size mismatch. deepcopy and pickle copy all five; weights that were shared inside of
    what is copied stay shared.
    """

    bias: Tensor | None
    channels: Tensor
    channel_bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        channels: Tensor | Sequence[int],
        *,
        dim: int = 0,
        train_bias: bool = True,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or dim not in (0, 1):
            raise ValueError(f"ChannelLinear: dim must be 0 (output rows) or 1 (input columns), got {dim!r}")
        check_choice("ChannelLinear", "impl", impl, (None, AUTO, *OP.impls))
        channels = _channels(channels, weight.shape[dim], weight)
        self.dim, self.impl = dim, impl
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("channels", channels)
        self.channel_weight = nn.Parameter(weight.detach().index_select(dim, channels))
        trained = None
        if bias is not None and dim == 0 and train_bias:
            trained = nn.Parameter(bias.detach().index_select(0, channels))
        self.register_parameter("channel_bias", trained)
        freeze(weight, bias)  # once there is memory for all the rest

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        channels: Tensor | Sequence[int],
        *,
        dim: int = 0,
        bias: bool = True,
        impl: str | None = None,
    ) -> ChannelLinear:
        """Tune some channels of `linear`, starting from their present values.

        The layer shares the linear's weight and bias, and freezes them (`requires_grad` False, `grad` None): the
        kernels write the trained channels into them.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same; on any device, "meta" included.
            channels: distinct indices of output rows (dim=0) or input columns (dim=1): int64 [k] on the weight's
                device, or integers. Their order is kept; k may be 0 or all.
            dim: 0 for output rows, 1 for input columns.
            bias: whether the bias of the chosen rows is tuned too (dim=0 and a linear with a bias).
            impl: passed on to `petl_kernels.channel_linear`.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is not a plain floating-point
                Parameter, channels that are not int64 [k].
            ValueError: channels that repeat, are negative, too large or on another device; dim; impl.
        """
        return cls(*weight_and_bias("ChannelLinear", linear), channels, dim=dim, train_bias=bias, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return channel_linear(
            x,
            self.weight,
            self.bias,
            self.channels,
            self.channel_weight,
            self.channel_bias,
            dim=self.dim,
            impl=self.impl,
        )

    def parts(self) -> Iterator[tuple[str, Tensor, int, Tensor | None]]:
        """Of weight and bias: name, tensor, dimension of its channels, and what is trained of it."""
        yield "weight", self.weight, self.dim, self.channel_weight
        if self.bias is not None:
            yield "bias", self.bias, 0, self.channel_bias

    @torch.no_grad()
    def sync_(self) -> ChannelLinear:
        """Write the trained channels into `weight` and `bias`, where they are not there yet.

        Of a layer that `fully_shard` has sharded, every rank must call this, and `state_dict`, which does: each
        needs all of the trained channels for its own rows.
        """
        for _, frozen, dim, trained in self.parts():
            if trained is None or frozen.is_meta:
                continue
            if is_traceable_wrapper_subclass(frozen):
                write_shard(frozen, dim, self.channels, trained)
                continue
            values = trained.to(frozen.dtype)
            # Unchanged tensors are not touched: a write would spoil a backward that still needs them.
            if not torch.equal(frozen.index_select(dim, self.channels), values):
                frozen.index_copy_(dim, self.channels, values)
        return self

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with a copy of exactly the weight and bias that this layer computes with.

        The layer stays as it is. The copy is frozen if `weight` is.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        for name, frozen, dim, trained in self.parts():
            copy = frozen.detach().clone()
            if trained is not None:
                copy.index_copy_(dim, self.channels, trained.to(copy.dtype))
            setattr(linear, name, nn.Parameter(copy, requires_grad=frozen.requires_grad))
        return linear.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.sync_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        *_, errors = rest
        loaded = state_dict.get(f"{prefix}channels")
        try:
            if loaded is not None:
                check_channels("ChannelLinear", loaded, self.weight.shape[self.dim], loaded)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}channels: {error}")
            return
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if len(errors) == before:
            self.sync_()

    def extra_repr(self) -> str:
        k, of = len(self.channels), ("output rows", "input columns")[self.dim]
        text = f"{self.in_features}, {self.out_features}, {k} of {self.weight.shape[self.dim]} {of}"
        text += f", bias={self.bias is not None}, channel_bias={self.channel_bias is not None}"
        return text if self.impl is None else f"{text}, impl={self.impl!r}"


def obstacle(linear: Any) -> str | None:
    """Why no ChannelLinear can stand for this module, or None."""
    if not isinstance(linear, nn.Linear):
        return f"linear must be an nn.Linear, got {type(linear).__name__}"
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"linear must compute what nn.Linear does; {type(linear).__name__} has a forward of its own"
    if linear._parameters.get("weight") is None:
        return "the weight of linear must be a Parameter; this one is computed (a parametrization?)"
    if linear.weight.dtype not in _DTYPES:
        return f"the weight of linear must be float32, bfloat16, float16 or float64, got {linear.weight.dtype}"
    return None


def weight_and_bias(owner: str, linear: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The Parameters of a linear that the layer `owner` takes over; a TypeError where `obstacle` has a reason."""
    if (reason := obstacle(linear)) is not None:
        raise TypeError(f"{owner}: {reason}")
    return linear._parameters["weight"], linear._parameters["bias"]


def _channels(channels: Any, size: int, weight: Tensor) -> Tensor:
    """The checked indices, a copy on the weight's device."""
    if isinstance(channels, Tensor):
        check_channels("ChannelLinear", channels, size, weight, of="weight")
        return channels.detach().clone()
    if isinstance(channels, str) or not isinstance(channels, Sequence):
        raise TypeError(f"ChannelLinear: channels must be int64 [k] or integers, got {type(channels).__name__}")
    if wrong := [c for c in channels if isinstance(c, bool) or not isinstance(c, int)]:
        raise TypeError(f"ChannelLinear: channels must be integers, got {wrong[0]!r}")
    indices = torch.tensor(channels, dtype=torch.int64, device="cpu")
    check_channels("ChannelLinear", indices, size, indices)
    return indices.to(weight.device)


def freeze(*parameters: nn.Parameter | None) -> None:
    """Let these parameters no longer train."""
    # An optimizer that holds a parameter steps it as long as it has a gradient, frozen or not.
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(False).grad = None


def plain_linear(layer: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear of these values, rounded once to the dtypes of the layer's own and frozen if those are; `bias` None
    for a copy of the layer's."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = _like(layer.weight, weight)
    if layer.bias is not None:
        linear.bias = _like(layer.bias, layer.bias.clone() if bias is None else bias)
    return linear.train(layer.training)


def _like(parameter: Tensor, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(parameter.dtype), requires_grad=parameter.requires_grad)
