"""LoRA and (IA)^3 inside nn.MultiheadAttention, which reads its stacked projection without calling a linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_number, check_probability, check_size
from petl_kernels.nn.bottleneck_adapter import INITS
from petl_kernels.nn.channel_linear import freeze
from petl_kernels.nn.lora_merged import add_branches
from petl_kernels.ops._op import REFERENCE
from petl_kernels.ops._select import AUTO
from petl_kernels.ops.channel_scale import OP, channel_scale

TARGETS = ("query", "key", "value")


class _Projecting(nn.MultiheadAttention):
    """nn.MultiheadAttention that computes rows of its stacked projection by a method, `project`.

    It shares and freezes the projection of the attention that it is made of, and shares its `out_proj`.
    """

    def __init__(self, attention: nn.MultiheadAttention, targets: Sequence[str]) -> None:
        owner = type(self).__name__
        if (reason := obstacle(attention)) is not None:
            raise TypeError(f"{owner}: attention {reason}")
        if isinstance(targets, str) or not targets or any(t not in TARGETS for t in targets):
            raise ValueError(f"{owner}: targets must be some of {TARGETS}, got {targets!r}")
        bias, heads = attention.in_proj_bias is not None, attention.num_heads
        super().__init__(attention.embed_dim, heads, attention.dropout, bias, device="meta")
        self.batch_first, self.out_proj = attention.batch_first, attention.out_proj
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.targets = tuple(t for t in TARGETS if t in targets)
        # nn.TransformerEncoderLayer has a fast path, which reads the weights past this forward unless this says no.
        self._qkv_same_embed_dim = False

    def project(self, x: Tensor, parts: range) -> Tensor:
        """x [..., d] -> the outputs of these parts of the projection, side by side, [..., len(parts) d]."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of nn.MultiheadAttention, but for nested tensors."""
        if query.is_nested:
            wanted = "it wants plain tensors; nn.TransformerEncoder makes nested ones unless enable_nested_tensor=False"
            raise ValueError(f"{type(self).__name__}: {wanted}")
        if attn_mask is None and is_causal:
            raise ValueError(f"{type(self).__name__}: is_causal is a hint beside attn_mask, which is missing")
        if query is key and key is value:  # one product for what one input goes into
            projected = self.project(query, range(3)).chunk(3, -1)
        elif key is value:
            projected = (self.project(query, range(1)), *self.project(key, range(1, 3)).chunk(2, -1))
        else:
            projected = tuple(self.project(x, range(i, i + 1)) for i, x in enumerate((query, key, value)))
        if not need_weights:
            return attend(self, projected, key_padding_mask, attn_mask, F.scaled_dot_product_attention), None
        weights: list[Tensor] = []

        def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights.append(F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout))
            return weights[0] @ v

        y = attend(self, projected, key_padding_mask, attn_mask, explicit)
        seen = weights[0].mean(1) if average_attn_weights else weights[0]
        return y, seen if query.dim() == 3 else seen[0]

    def _rows(self, parts: range) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of parts of the projection."""
        rows = slice(parts.start * self.embed_dim, parts.stop * self.embed_dim)
        return self.in_proj_weight[rows], None if self.in_proj_bias is None else self.in_proj_bias[rows]

    def _plain(self, weight: Tensor, bias: Tensor | None) -> nn.MultiheadAttention:
        """nn.MultiheadAttention with this projection, rounded once to the dtype of the layer's own."""
        made = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias is not None, batch_first=self.batch_first, device="meta"
        )
        made.out_proj = self.out_proj
        for name, value, own in (("weight", weight, self.in_proj_weight), ("bias", bias, self.in_proj_bias)):
            if value is not None and own is not None:
                rounded = nn.Parameter(value.to(own.dtype, copy=True), requires_grad=own.requires_grad)
                setattr(made, f"in_proj_{name}", rounded)
        return made.train(self.training)


class LoRAMultiheadAttention(_Projecting):
    """nn.MultiheadAttention with `(alpha / rank) dropout(x) A_i^T B_i^T` added to its queries, keys or values.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3). The branches are those of `LoRAMergedLinear`: where one input
    makes queries, keys and values, as in nn.TransformerEncoderLayer, there is one dense product and one stacked
    down-projection; an attention over another input has a product for each. The weight is never formed with the update
    in it, so that no dense weight gradient is computed. Starts as the attention itself: A Kaiming uniform (a = sqrt 5),
    B zero.

    Made by `from_attention`.

    Attributes:
        in_proj_weight, in_proj_bias, out_proj: the attention's own, the first two frozen; under the same names in the
            state_dict.
        targets: which of "query", "key", "value" have a branch, in this order.
        w_down: all A_i, one above the other, [n rank, d].
        w_up: all B_i, one above the other, [n d, rank].

    Parameters: 2 n rank d for n targets.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        rank: int,
        targets: Sequence[str] = ("query", "value"),
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        impl: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = "LoRAMultiheadAttention"
        check_size(owner, "rank", rank)
        check_probability(owner, "dropout", dropout)
        check_choice(owner, "impl", impl, (None, AUTO, REFERENCE))
        if alpha is not None:
            check_number(owner, "alpha", alpha, "None or ")
        super().__init__(attention, targets)
        self.rank, self.lora_dropout, self.impl = rank, float(dropout), impl
        self.alpha = float(rank if alpha is None else alpha)
        n, d, weight = len(self.targets), self.embed_dim, self.in_proj_weight
        like: Any = dict(device=weight.device, dtype=dtype or weight.dtype)
        self.w_down = nn.Parameter(torch.empty(n * rank, d, **like))
        self.w_up = nn.Parameter(torch.empty(n * d, rank, **like))
        self.reset_parameters()
        freeze(self.in_proj_weight, self.in_proj_bias)  # once there is memory for all the rest

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, rank: int, targets: Sequence[str] = ("query", "value"), **options: Any
    ) -> LoRAMultiheadAttention:
        """Put low-rank branches into `attention`, whose parameters it shares, and whose stacked projection it freezes.

        Args:
            attention: an nn.MultiheadAttention with one stacked projection; on any device, "meta" included.
            rank: r of each branch, from 1 up.
            targets: some of "query", "key", "value".
            alpha: the branches are multiplied by alpha / rank; None for rank, which makes that 1.
            dropout: of x on its way into the branches, in training; those of one input share a draw.
            impl: as of `LoRAMergedLinear`.
            dtype: of what trains; None for the weight's.

        Raises:
            TypeError: no nn.MultiheadAttention, a subclass with a forward of its own, widths or keys of its own (kdim,
                vdim, add_bias_kv, add_zero_attn).
            ValueError: rank, targets, alpha, dropout or impl outside the above.
        """
        return cls(attention, rank, targets, **options)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the attention itself."""
        INITS["lora"](self.w_down, self.w_up)

    def project(self, x: Tensor, parts: range) -> Tensor:
        d, r = self.embed_dim, self.rank
        branches = [i for i, target in enumerate(self.targets) if TARGETS.index(target) in parts]
        if not branches:
            return F.linear(x, *self._rows(parts))
        first, last = branches[0], branches[-1] + 1
        starts = [d * (TARGETS.index(self.targets[i]) - parts.start) for i in branches]
        down: Tensor = self.w_down
        up: Tensor = self.w_up
        if len(branches) < len(self.targets):  # or the gradient of a slice is one more tensor to fill
            down, up = down[first * r : last * r], up[first * d : last * d]
        slices = tuple((start, start + d) for start in starts)
        dropout = self.lora_dropout if self.training else 0.0
        return add_branches(x, *self._rows(parts), down, up, slices, self.scale, dropout, self.impl)

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """A plain nn.MultiheadAttention with `W_i + scale B_i A_i`, in float64 and rounded once; shares `out_proj`.

        The layer stays as it is: to unmerge exactly, put it back.
        """
        weight, d, r = self.in_proj_weight.to(torch.float64, copy=True), self.embed_dim, self.rank
        for i, target in enumerate(self.targets):
            up, down = self.w_up[i * d : (i + 1) * d].double(), self.w_down[i * r : (i + 1) * r].double()
            weight[TARGETS.index(target) * d :][:d] += self.scale * (up @ down)
        return self._plain(weight, self.in_proj_bias)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, heads={self.num_heads}, rank={self.rank}, targets={self.targets}"
        return f"{text}, alpha={self.alpha:g}" + (f", dropout={self.lora_dropout}" if self.lora_dropout else "")


class IA3MultiheadAttention(_Projecting):
    """nn.MultiheadAttention whose keys and values, or others, are multiplied by a trained factor per channel.

    (IA)^3 (Liu et al. 2022, arXiv:2205.05638, section 3.3), as `IA3Linear` behind the projections. Starts as the
    attention itself: ones.

    Made by `from_attention`.

    Attributes:
        in_proj_weight, in_proj_bias, out_proj: the attention's own, the first two frozen; under the same names in the
            state_dict.
        targets: which of "query", "key", "value" are scaled, in this order.
        factors: [n d] for n targets, what trains.

    Parameters: n d.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        targets: Sequence[str] = ("key", "value"),
        *,
        impl: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("IA3MultiheadAttention", "impl", impl, (None, AUTO, *OP.impls))
        super().__init__(attention, targets)
        self.impl, weight = impl, self.in_proj_weight
        size = len(self.targets) * self.embed_dim
        self.factors = nn.Parameter(torch.empty(size, device=weight.device, dtype=dtype or weight.dtype))
        self.reset_parameters()
        freeze(self.in_proj_weight, self.in_proj_bias)  # once there is memory for all the rest

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, targets: Sequence[str] = ("key", "value"), **options: Any
    ) -> IA3MultiheadAttention:
        """Put vectors of ones behind projections of `attention`, as `LoRAMultiheadAttention` puts branches beside them.

        Args:
            attention: an nn.MultiheadAttention with one stacked projection; on any device, "meta" included.
            targets: some of "query", "key", "value".
            impl: passed on to `petl_kernels.channel_scale`.
            dtype: of the vectors; None for the weight's.

        Raises:
            TypeError: as of `LoRAMultiheadAttention.from_attention`.
            ValueError: targets or impl outside the above.
        """
        return cls(attention, targets, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the attention itself."""
        self.factors.fill_(1.0)

    def project(self, x: Tensor, parts: range) -> Tensor:
        y = F.linear(x, *self._rows(parts))
        if not any(TARGETS.index(target) in parts for target in self.targets):
            return y
        return channel_scale(y, self._of_parts(parts), impl=self.impl)

    def _of_parts(self, parts: range) -> Tensor:
        """A factor for each output of these parts, ones where none trains, so that one call scales them all."""
        own = dict(zip(self.targets, self.factors.chunk(len(self.targets))))
        return torch.cat(
            [own[t] if t in own else self.factors.new_ones(self.embed_dim) for t in TARGETS[parts.start : parts.stop]]
        )

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """A plain nn.MultiheadAttention with the factors multiplied into weight and bias, in float64 and rounded once.

        It shares `out_proj`. The layer stays as it is.
        """
        factors = self._of_parts(range(3)).double()
        bias = None if self.in_proj_bias is None else self.in_proj_bias * factors
        return self._plain(self.in_proj_weight * factors[:, None], bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, targets={self.targets}"


def obstacle(attention: Any) -> str | None:
    """Why no projection of ours can stand in this attention, or None."""
    if not isinstance(attention, nn.MultiheadAttention):
        return f"must be an nn.MultiheadAttention, got {type(attention).__name__}"
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"has a forward of its own, that of {type(attention).__name__}"
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        return "has widths or keys of its own (kdim, vdim, add_bias_kv, add_zero_attn)"
    return None


def attend(
    attention: nn.MultiheadAttention,
    projected: Sequence[Tensor],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    function: Callable[..., Tensor],
) -> Tensor:
    """What nn.MultiheadAttention makes of its projected query, key and value, with `function(query, key, value, mask,
    dropout)` over heads [batch, heads, tokens, d_head] in the place of F.scaled_dot_product_attention."""
    batched = projected[0].dim() == 3
    batch_first = batched and attention.batch_first

    def heads(x: Tensor) -> Tensor:
        x = x if batched else x[:, None]
        x = x if batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    q, k, v = map(heads, projected)
    mask: Any = None
    if attn_mask is not None:
        mask = _added(attn_mask, q)
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, attention.num_heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q).view(-1, 1, 1, k.shape[2])
        mask = padding if mask is None else mask + padding
    y = function(q, k, v, mask, attention.dropout if attention.training else 0.0).transpose(1, 2).flatten(2)
    y = y if batch_first else y.transpose(0, 1)
    return attention.out_proj(y if batched else y[:, 0])


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of nn.MultiheadAttention, True where a key is hidden, as what is added to scores."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
