"""Prefix tuning as an adapter of one attention layer: the concatenated form and the gated form of the unified view."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_heads, check_probability, check_size
from petl_kernels.ops._validate import check_shape, check_tensor


class PrefixAdapter(nn.Module):
    """`softmax(q [P_k; K]^T) [P_v; V]` per head, with trained keys P_k and values P_v before the layer's own K and V.

    Li and Liang 2021 (arXiv:2101.00190), as He et al. 2021 (arXiv:2110.04366, equations 7 and 8) place it among the
    adapters: with attention `h` over K and V alone, the same output is

        (1 - lam) h + lam softmax(q P_k^T) P_v,    lam = sum exp(q P_k^T) / (sum exp(q P_k^T) + sum exp(q K^T)).

    `forward` is the left form, one call of `torch.nn.functional.scaled_dot_product_attention`; `gate` the right one,
    for attention implementations that return the log-sum-exp of their scores. q carries its scale in both places.

    Args:
        d_model: width d of the attention layer's keys.
        heads: its number of key heads, a divisor of d.
        length: number l of prefix tokens.
        groups: query heads of each key head: 1, or more in grouped-query attention, where d is less than the model's.
        reparametrization: width h of the network that makes P_k and P_v while they train, Embedding(l, d) ->
            Linear(d, h) -> Tanh -> Linear(h, 2 d), its first d outputs being P_k; or None for plain parameters.
            He et al. use 800. They share embedding and first layer among all layers of one kind of attention; here
            every layer has its own.
        dropout: of the elements of P_k and P_v in training, drawn for each sequence of the batch, as theirs.
        device, dtype: of the parameters; "meta" defers memory until `to_empty` and `reset_parameters`.

    Shapes: key, value [l, d] without the network; embedding.weight [l, d], mlp.0 [h, d], mlp.2 [2 d, h] with it. Head i
    takes channels i d/heads to (i + 1) d/heads, as attention layers split them.

    Parameters: 2 l d without the network; with it l d + d h + h + 2 h d + 2 d, of which `materialize` leaves 2 l d.

    Initial behaviour: not the identity. Plain P are normal of std 0.02, so that prefix tokens score about 0 and hold
    about 0: attention shrinks by 1 - lam. The network starts as PyTorch initialises its layers, as He et al. leave it.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        length: int = 30,
        *,
        groups: int = 1,
        reparametrization: int | None = 800,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads("PrefixAdapter", d_model, heads)
        check_size("PrefixAdapter", "length", length)
        check_size("PrefixAdapter", "groups", groups)
        if reparametrization is not None:
            check_size("PrefixAdapter", "reparametrization", reparametrization, "None or ")
        check_probability("PrefixAdapter", "dropout", dropout)
        self.d_model, self.heads, self.d_head, self.length = d_model, heads, d_model // heads, length
        self.groups, self.reparametrization, self.dropout = groups, reparametrization, float(dropout)
        if (h := reparametrization) is None:
            self.key = nn.Parameter(torch.empty(length, d_model, device=device, dtype=dtype))
            self.value = nn.Parameter(torch.empty(length, d_model, device=device, dtype=dtype))
            self.reset_parameters()
            return
        # These draw their weights themselves, in the order of `reset_parameters`.
        self.embedding = nn.Embedding(length, d_model, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, h, device=device, dtype=dtype),
            nn.Tanh(),
            nn.Linear(h, 2 * d_model, device=device, dtype=dtype),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw plain P from a normal of std 0.02, or the network as PyTorch initialises its layers."""
        if self.reparametrization is None:
            nn.init.normal_(self.key, std=0.02)
            nn.init.normal_(self.value, std=0.02)
            return
        for layer in (self.embedding, self.mlp[0], self.mlp[2]):
            layer.reset_parameters()  # type: ignore[operator]

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v by heads, [heads, length, d_head], without dropout."""
        key, value = self._prefix()
        return self._by_heads(key), self._by_heads(value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over the prefix and the given keys; every query sees the whole prefix.

        Takes what `torch.nn.functional.scaled_dot_product_attention` takes. P is cast to the dtypes of `key` and
        `value`. Without a mask none is made. With `is_causal` one of [tokens, l + keys] is made, because PyTorch's own
        flag cannot be shifted by the prefix.

        Args:
            query: [batch, groups heads, tokens, d_head], float32, bfloat16, float16 or float64.
            key, value: of query's heads, [batch, groups heads, keys, d_head], or with `enable_gqa` of fewer,
                [batch, heads, keys, d_head]; `keys` may differ from `tokens`.
            attn_mask: of the given keys alone, broadcastable to [batch, groups heads, tokens, keys], of 2 to 4
                dimensions: bool, True where a query sees a key, or floating point, added to the scores. A query that
                sees no key attends to the prefix only.
            dropout_p: of the attention weights, those of the prefix among them.
            is_causal: query i sees keys 0 to i, counted without the prefix, as PyTorch's `is_causal` has it whatever
                the two numbers.
            scale: of the scores; None for 1 / sqrt(d_head).
            enable_gqa: key and value have one head for each `groups` of query's.

        Returns:
            [batch, groups heads, tokens, d_head].

        Raises:
            ValueError: a shape or device that does not fit, or `attn_mask` beside `is_causal`.
            TypeError: not a floating-point tensor, float64 beside another dtype, a mask of integers.
        """
        self._check("query", query)
        heads = self.heads if enable_gqa else self.heads * self.groups
        self._check("key", key, batch=query.shape[0], heads=heads)
        self._check("value", value, batch=query.shape[0], tokens=key.shape[2], heads=heads)
        mask = self._mask(query, key, attn_mask, is_causal)
        prefix_key, prefix_value = self._for_batch(query.shape[0], heads)
        keys = torch.cat((prefix_key.to(key.dtype), key), -2)
        values = torch.cat((prefix_value.to(value.dtype), value), -2)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )

    def gate(self, query: Tensor, output: Tensor, logsumexp: Tensor, scale: float | None = None) -> Tensor:
        """`(1 - lam) output + lam softmax(q P_k^T) P_v` with `lam = sigmoid(logsumexp(q P_k^T) - logsumexp)`.

        The unified form: equal to `forward` where `output` and `logsumexp` come from attention over the given keys,
        under whatever mask. Scores, lam and the mixture are computed in float32 (float64 for float64), under autocast
        too.

        The gradients of P are exact as they stand. Those of query and keys have a part that goes through `logsumexp`:
        it is lost where the implementation returns one that is not differentiable (PyTorch's flash kernels do, its
        flex_attention does not).

        Args:
            query: [batch, groups heads, tokens, d_head].
            output: what attention over the given keys gave, like query.
            logsumexp: natural logarithm of the sum of the exponentials of its scaled scores, [batch, groups heads,
                tokens]. An infinite one, of either sign (flash-attention writes +inf), marks a query that saw no key:
                lam is 1, and its `output` is not read. PyTorch's CPU kernel writes 0 there, which says nothing: write
                -inf.
            scale: of the scores, that of the attention; None for 1 / sqrt(d_head).

        Returns:
            [batch, groups heads, tokens, d_head] in output's dtype.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        self._check("query", query)
        self._check("output", output, batch=query.shape[0], tokens=query.shape[2])
        check_tensor("PrefixAdapter", "logsumexp", logsumexp, query, "query")
        check_shape("PrefixAdapter", "logsumexp", logsumexp, tuple(query.shape[:3]), "[batch, heads, tokens]")
        key, value = self._for_batch(query.shape[0], query.shape[1])
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        key, value = key.to(dtype), value.to(dtype)
        key = key * (1 / math.sqrt(self.d_head) if scale is None else scale)  # l x d, less than query or scores
        with _no_autocast(query.device):
            scores = query.to(dtype) @ key.transpose(-2, -1)
            own = scores.softmax(-1) @ value
        unseen = logsumexp.isinf()
        main = logsumexp.to(dtype).masked_fill(unseen, -math.inf)
        lam = torch.sigmoid(scores.logsumexp(-1) - main)
        # Times 1 - lam = 0 a NaN would stay one.
        seen = output.to(dtype).masked_fill(unseen.unsqueeze(-1), 0.0)
        return torch.lerp(seen, own, lam.unsqueeze(-1)).to(output.dtype)

    @torch.no_grad()
    def materialize(self) -> PrefixAdapter:
        """An adapter without the network that holds the present P_k and P_v, bit for bit.

        For inference, and for files of 2 l d numbers. A copy: this adapter stays as it is. The copy trains if any
        parameter of this one does.
        """
        device, dtype = (own := next(self.parameters())).device, own.dtype
        plain = PrefixAdapter(
            self.d_model,
            self.heads,
            self.length,
            groups=self.groups,
            reparametrization=None,
            dropout=self.dropout,
            device="meta",
            dtype=dtype,
        )
        with _no_autocast(device):
            key, value = self._prefix()
        trains = any(p.requires_grad for p in self.parameters())
        # Contiguous copies, or a file of one would hold the storage of both.
        plain.key, plain.value = (
            nn.Parameter(p.clone(memory_format=torch.contiguous_format), requires_grad=trains) for p in (key, value)
        )
        return plain.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.d_model}, {self.heads}, {self.length}, reparametrization={self.reparametrization}"
        text += f", groups={self.groups}" if self.groups > 1 else ""
        return f"{text}, dropout={self.dropout}" if self.dropout else text

    def _prefix(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, [length, d]."""
        if self.reparametrization is None:
            return self.key, self.value
        key, value = self.mlp(self.embedding.weight).chunk(2, -1)  # the embedding of tokens 0 to l - 1
        return key, value

    def _by_heads(self, prefix: Tensor) -> Tensor:
        return prefix.unflatten(-1, (self.heads, self.d_head)).transpose(0, 1)

    def _for_batch(self, batch: int, heads: int) -> tuple[Tensor, Tensor]:
        """P_k and P_v for each sequence and so many heads, [batch, heads, length, d_head], after dropout."""
        pair = (F.dropout(p.expand(batch, -1, -1, -1), self.dropout, self.training) for p in self.keys_values())
        key, value = (p if heads == self.heads else p.repeat_interleave(self.groups, 1) for p in pair)
        return key, value

    def _mask(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """The mask of the prefix and the given keys together."""
        batch, heads, tokens, keys = *query.shape[:3], key.shape[2]
        if is_causal:
            if mask is not None:
                raise ValueError("PrefixAdapter: attn_mask must be None beside is_causal=True, got a mask")
            ones = torch.ones(tokens, self.length + keys, dtype=torch.bool, device=query.device)
            return ones.tril(self.length)
        if mask is None:
            return None
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"PrefixAdapter: attn_mask must be bool or floating point, got {mask.dtype}")
        wanted = (batch, heads, tokens, keys)
        fits = all(size in (1, full) for size, full in zip(mask.shape[::-1], wanted[::-1]))
        if not 2 <= mask.dim() <= 4 or not fits:
            words = f"2 to 4 dimensions that broadcast to [batch, heads, tokens, keys] = {list(wanted)}"
            raise ValueError(f"PrefixAdapter: attn_mask must be of {words}, got {list(mask.shape)}")
        mask = mask.expand(*mask.shape[:-1], keys)
        return F.pad(mask, (self.length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)

    def _check(
        self, name: str, value: Any, batch: int | None = None, tokens: int | None = None, heads: int | None = None
    ) -> None:
        """A tensor [batch, heads, tokens, d_head] on the parameters' device. None: any size, or query's heads."""
        check_tensor("PrefixAdapter", name, value, next(self.parameters()), "the prefix")
        wanted = (batch, self.heads * self.groups if heads is None else heads, tokens, self.d_head)
        if value.dim() != 4 or any(w is not None and w != n for w, n in zip(wanted, value.shape)):
            shown = ", ".join("*" if w is None else str(w) for w in wanted)
            words = "[batch, heads, tokens, d_head]"
            raise ValueError(f"PrefixAdapter: {name} must be {words} = [{shown}], got {list(value.shape)}")


def _no_autocast(device: torch.device) -> Any:
    # The meta device has no autocast, and switching it off is an error.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
