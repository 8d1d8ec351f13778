"""Diff pruning: a sparse difference to a frozen linear, whose gates learn which entries or channels it needs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels._names import check_model
from petl_kernels.nn._check import check_choice, check_number
from petl_kernels.nn.channel_linear import ChannelLinear, freeze, plain_linear, weight_and_bias

GROUPS = ("rows", "columns", "tensor", None)


class DiffPruningLinear(nn.Module):
    """`x (W + z * delta)^T + b + z_b * delta_b`, with W and b frozen and hard-concrete gates z in [0, 1].

    Guo et al. 2021 (arXiv:2012.07463, sections 3.1 and 3.2). An entry's gate is the product of its own and of its
    group's, each `clamp(s (high - low) + low, 0, 1)` with `s = sigmoid((log u - log(1 - u) + alpha) / temperature)`
    and u uniform, drawn anew at each call in training; in evaluation, without a draw, `s = sigmoid(alpha)` (Louizos et
    al. 2018, arXiv:1712.01312, equation 13). The paper's groups are whole tensors; rows or columns of the weight, ours,
    make the difference one of channels, which `to_channel_linear` hands to `nn.ChannelLinear`.

    1. Train `loss + weight * expected_l0(model)`, with a learning rate for the gates of its own; the authors' code has
       weight 1.25e-7 and 0.1.
    2. `project_(k)`, or `project_diffs(model, k)` over all layers: the largest entries stay, their gates fixed.
    3. Train on, at a fixed mask: the same module, or the one that `to_channel_linear` makes.

    Starts as the linear itself: delta is zero, alpha 5. Made by `from_linear`.

    Attributes:
        weight, bias: the linear's own Parameters, frozen and never written to.
        delta, delta_bias: w of the paper, of the shape of weight and bias; delta_bias is None with bias=False.
        alpha, alpha_bias: of the entries' gates, likewise; None with elements=False.
        alpha_group: of the groups' gates, [d_out, 1] (rows), [1, d_in] (columns), [1, 1] (tensor), or None.
        alpha_group_bias: [1], the bias as a group; None for rows, of which each has its entry of the bias in it.

    state_dict holds those that are not None; a fixed gate is an alpha of plus or minus infinity. What is not in the
    weight's dtype is float32: the five beside a half-precision weight, unless another dtype was asked for.
    """

    bias: Tensor | None
    delta: Tensor
    delta_bias: Tensor | None
    alpha: Tensor | None
    alpha_bias: Tensor | None
    alpha_group: Tensor | None
    alpha_group_bias: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        groups: str | None = "rows",
        elements: bool = True,
        train_bias: bool = True,
        alpha: float = 5.0,
        temperature: float = 1.0,
        stretch: tuple[float, float] = (-1.5, 1.5),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("DiffPruningLinear", "groups", groups, GROUPS)
        check_number("DiffPruningLinear", "alpha", alpha)
        check_number("DiffPruningLinear", "temperature", temperature)
        if groups is None and not elements:
            raise ValueError("DiffPruningLinear: elements must be True where groups is None; nothing would have a gate")
        if temperature <= 0:
            raise ValueError(f"DiffPruningLinear: temperature must be positive, got {temperature!r}")
        low, high = stretch
        if not low < 0 or not high > 1:
            raise ValueError(f"DiffPruningLinear: stretch must be a number below 0 and one above 1, got {stretch!r}")
        self.out_features, self.in_features = weight.shape
        self.groups, self.elements = groups, bool(elements)
        self.initial_alpha, self.temperature, self.stretch = float(alpha), float(temperature), (float(low), float(high))
        self.weight = weight
        self.register_parameter("bias", bias)
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        grouped = {"rows": (self.out_features, 1), "columns": (1, self.in_features), "tensor": (1, 1)}.get(groups or "")
        with_bias = bias is not None and train_bias
        shapes: dict[str, tuple[int, ...] | None] = {
            "delta": (self.out_features, self.in_features),
            "delta_bias": (self.out_features,) if with_bias else None,
            "alpha": (self.out_features, self.in_features) if elements else None,
            "alpha_bias": (self.out_features,) if elements and with_bias else None,
            "alpha_group": grouped,
            "alpha_group_bias": (1,) if with_bias and groups in ("columns", "tensor") else None,
        }
        for name, shape in shapes.items():
            empty = None if shape is None else torch.empty(shape, device=weight.device, dtype=dtype)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()
        freeze(weight, bias)  # once there is memory for all the rest

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, bias: bool = True, **options: Any) -> DiffPruningLinear:
        """Put a gated difference beside the weight and bias of `linear`, which it shares and freezes.

        Args:
            linear: an nn.Linear, or of a subclass that computes the same; on any device, "meta" included.
            bias: whether the bias has a difference too.
            groups: "rows" (outputs), "columns" (inputs), "tensor" (the paper's structured form), or None for gates of
                entries alone.
            elements: whether entries have gates of their own; without them groups open and close whole.
            alpha: where the gates start: 5 opens 97 % of them in full.
            temperature: of the concrete distribution; 1 in the authors' code.
            stretch: (low, high), the interval that is clamped to [0, 1].
            dtype: of what trains; None for the weight's, or float32 where that is a half-precision one.

        Raises:
            TypeError: not a linear, a subclass with a forward of its own, a weight that is no plain floating-point
                Parameter.
            ValueError: an option outside the above.
        """
        return cls(*weight_and_bias("DiffPruningLinear", linear), train_bias=bias, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the linear itself, every gate at its first alpha and training."""
        for name, p in self._parameters.items():
            if p is not None and name.startswith("delta"):
                p.zero_()
        for p in self._alphas():
            p.fill_(self.initial_alpha).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return F.linear(x, *self._sums(self.training))

    def gates(self) -> tuple[Tensor, Tensor | None]:
        """z of weight and bias as evaluation has them, of the shapes of delta and delta_bias."""
        return self._gates(False)

    def expected_l0(self) -> Tensor:
        """How many entries of the difference are expected to have an open gate: the penalty, a scalar.

        `P(z > 0) = sigmoid(alpha - temperature log(-low / high))`, for an entry times that of its group.
        """
        low, high = self.stretch
        shift = self.temperature * math.log(-low / high)
        weight, bias = self._products(lambda alpha: torch.sigmoid(alpha - shift))
        return weight.sum() if bias is None else weight.sum() + bias.sum()

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """|z delta| of every entry, weight before bias; without gates of entries the L2 norm of each group. 1-D."""
        (weight, bias), groups = self._differences(), self.alpha_group
        if self.elements or groups is None:
            return torch.cat([t.abs().flatten() for t in (weight, bias) if t is not None])
        squares = weight.square().sum_to_size(groups.shape).flatten()
        if bias is not None and self.groups == "rows":
            squares = squares + bias.square()
        elif bias is not None:
            squares = torch.cat([squares, bias.square().sum()[None]])
        return squares.sqrt()

    def project_(self, k: int) -> DiffPruningLinear:
        """Keep the k entries of the largest magnitude; without gates of entries the k groups.

        Their gates are folded into delta, fixed open, and all others fixed closed: what is closed stays out of the sum,
        bit by bit, whatever an optimizer's weight decay does to its delta.

        Raises:
            ValueError: k below 0 or above what there is.
        """
        return self.fix_(_largest("project_", self.magnitudes(), k))

    @torch.no_grad()
    def fix_(self, kept: Tensor) -> DiffPruningLinear:
        """`project_` to a mask of one's own: bool, 1-D, in the order of `magnitudes`."""
        units = self.magnitudes()
        if kept.dtype != torch.bool or kept.shape != units.shape:
            got = f"{kept.dtype} {list(kept.shape)}"
            raise ValueError(f"DiffPruningLinear: kept must be torch.bool {list(units.shape)}, got {got}")
        for delta, folded in zip((self.delta, self.delta_bias), self._differences()):
            if delta is not None and folded is not None:
                delta.copy_(folded)
        own = [self.alpha, self.alpha_bias] if self.elements else [self.alpha_group, self.alpha_group_bias]
        for p in self._alphas():
            freeze(p)
            p.fill_(math.inf)
        first = 0
        for alpha in own:
            if alpha is not None:
                closed = ~kept[first : first + alpha.numel()].view_as(alpha)
                alpha.masked_fill_(closed, -math.inf)
                first += alpha.numel()
        return self

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the sums that evaluation computes with. Frozen if `weight` is; the layer stays."""
        weight, bias = self._sums(False)
        return plain_linear(self, weight, None if bias is self.bias else bias)

    @torch.no_grad()
    def to_channel_linear(self, k: int | None = None, **options: Any) -> ChannelLinear:
        """An nn.ChannelLinear that trains on the channels which the difference has come to, and nothing else.

        It takes the weight over, and writes into it: do not go on with this layer.

        Args:
            k: the k rows or columns of the largest L2 norm of the difference; None for all in which it is not zero,
                which makes the same function.
            options: of `nn.ChannelLinear`, such as impl.

        Raises:
            ValueError: groups are not rows or columns; k below 0 or above what there is.
        """
        if self.groups not in ("rows", "columns"):
            raise ValueError(f"DiffPruningLinear: groups must be rows or columns to make channels, got {self.groups!r}")
        dim = ("rows", "columns").index(self.groups)
        (difference, of_bias), (weight, bias) = self._differences(), self._sums(False)
        norms = difference.square().sum(1 - dim)
        if dim == 0 and of_bias is not None:
            norms += of_bias.square()
        channels = (norms > 0 if k is None else _largest("to_channel_linear", norms, k)).nonzero().flatten()
        own_bias = self._parameters["bias"]
        if dim == 1 and of_bias is not None and bias is not None:
            own_bias = nn.Parameter(bias, requires_grad=False)  # which is no channel's, and stays as it has become
        assert isinstance(self.weight, nn.Parameter)
        made = ChannelLinear(
            self.weight, own_bias, channels, dim=dim, train_bias=self.delta_bias is not None, **options
        )
        made.channel_weight.copy_(weight.index_select(dim, channels))
        if made.channel_bias is not None and bias is not None:
            made.channel_bias.copy_(bias.index_select(0, channels))
        return made.train(self.training)

    def _alphas(self) -> list[nn.Parameter]:
        return [p for name, p in self._parameters.items() if p is not None and name.startswith("alpha")]

    def _products(self, of: Any) -> tuple[Tensor, Tensor | None]:
        """`of` every entry's alpha times `of` its group's, of the shapes of delta and delta_bias."""
        entries = of(self.alpha) if self.alpha is not None else None
        groups = of(self.alpha_group) if self.alpha_group is not None else None
        weight = _product(entries, groups).expand_as(self.delta)
        if self.delta_bias is None:
            return weight, None
        entries = of(self.alpha_bias) if self.alpha_bias is not None else None
        if self.alpha_group_bias is not None:
            groups = of(self.alpha_group_bias)
        elif groups is not None:
            groups = groups.flatten()  # rows, with the draw of the weight's
        return weight, _product(entries, groups).expand_as(self.delta_bias)

    def _gates(self, drawn: bool) -> tuple[Tensor, Tensor | None]:
        low, high = self.stretch

        def gate(alpha: Tensor) -> Tensor:
            if drawn:  # u = 0 or 1 would be an infinite logit, and NaN beside a fixed gate
                eps = torch.finfo(alpha.dtype).eps
                u = torch.rand_like(alpha).clamp(eps, 1 - eps)
                alpha = (u.logit() + alpha) / self.temperature
            return (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)

        return self._products(gate)

    def _differences(self, drawn: bool = False) -> tuple[Tensor, Tensor | None]:
        """z * delta of weight and bias."""
        weight, bias = self._gates(drawn)
        return weight * self.delta, None if bias is None or self.delta_bias is None else bias * self.delta_bias

    def _sums(self, drawn: bool) -> tuple[Tensor, Tensor | None]:
        """What is multiplied with, each rounded once to the dtype of what is frozen."""
        weight, bias = self._differences(drawn)
        total = (self.weight + weight).to(self.weight.dtype)
        if self.bias is None or bias is None:
            return total, self.bias
        return total, (self.bias + bias).to(self.bias.dtype)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, groups={self.groups!r}, elements={self.elements}"
        return f"{text}, bias={self.bias is not None}, delta_bias={self.delta_bias is not None}"


def expected_l0(model: nn.Module) -> Tensor:
    """The penalty of all `DiffPruningLinear` of a model: how many entries are expected to have an open gate.

    Raises:
        TypeError: not a model.
        ValueError: one without such layers.
    """
    return torch.stack([layer.expected_l0() for layer in _layers("expected_l0", model)]).sum()


def project_diffs(model: nn.Module, k: int) -> None:
    """`project_` over all `DiffPruningLinear` of a model at once: the k largest of all their magnitudes stay.

    Guo et al. 2021, section 3.3: k is their target sparsity, 0.5 %, times the number of parameters.

    Raises:
        TypeError: not a model.
        ValueError: one without such layers, or with both entries and groups as what is kept; k.
    """
    layers = _layers("project_diffs", model)
    if len({layer.elements for layer in layers}) > 1:
        raise ValueError("project_diffs: layers must all have gates of entries or all not, to be compared")
    magnitudes = [layer.magnitudes() for layer in layers]
    kept = _largest("project_diffs", torch.cat(magnitudes), k)
    for layer, part in zip(layers, kept.split([m.numel() for m in magnitudes])):
        layer.fix_(part)


def _layers(op: str, model: nn.Module) -> list[DiffPruningLinear]:
    check_model(op, model)
    if found := [module for module in model.modules() if isinstance(module, DiffPruningLinear)]:
        return found
    raise ValueError(f"{op}: {type(model).__name__} has no DiffPruningLinear")


def _largest(op: str, values: Tensor, k: Any) -> Tensor:
    """A mask of the k largest."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= values.numel():
        raise ValueError(f"{op}: k must be an integer from 0 to {values.numel()}, got {k!r}")
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.topk(k).indices, True)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        present = a if b is None else b
        assert present is not None  # refused by the constructor
        return present
    return a * b
