"""The mix-and-match adapter of He et al.: a short prefix at the attention, a wide adapter beside the feed-forward."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from petl_kernels.nn._check import check_heads, check_probability, check_size
from petl_kernels.nn.parallel import ParallelAdapter
from petl_kernels.nn.prefix import PrefixAdapter


class MAM(nn.Module):
    """A `PrefixAdapter` and a `ParallelAdapter` for one transformer layer, with their published defaults.

    He et al. 2021 (arXiv:2110.04366): l = 30, r = 512, scale 4 for summarisation and translation; l = 16,
    r = 16, scale 2 on GLUE. It bundles the two and computes nothing itself. With x the layer's input and LN where the
    layer has them, they go

        attention:     heads = layer.prefix(query, key, value, attn_mask=...)       in the place of attention
        feed-forward:  out   = layer.parallel(x, fc2(act(fc1(x))))                  x is what fc1 reads

    with `layer` the MAM; the residual connection and its norm follow as ever (post-LN models such as BART). A decoder
    layer has a second attention, over the encoder's output, which takes a `PrefixAdapter` of its own.

    Attributes:
        prefix: `PrefixAdapter(d_model, heads, prefix_length)`.
        parallel: `ParallelAdapter(d_model, bottleneck, scale=scale)`.

    Args:
        d_model, heads: of the layer.
        prefix_length: l, the number of prefix tokens.
        bottleneck: r, of the parallel adapter.
        scale: of the parallel adapter: a float, "learned" or "channel".
        reparametrization: of the prefix: width of the network that makes it in training, or None.
        prefix_dropout: of the prefix.
        device, dtype: of the parameters; "meta" defers memory until `to_empty` and `reset_parameters`.
        options: what else `ParallelAdapter` takes (bias, impl, ...).

    Parameters: 2 l d + 2 r d + r + d without reparametrization and with a float as scale; see `PrefixAdapter` for what
    a network adds. All of BART-large (d = 1024; 36 attentions, 24 feed-forwards): 27,414,528.

    Initial behaviour: the parallel adapter adds zero, the prefix is not the identity (see `PrefixAdapter`).

    Raises:
        ValueError: an argument outside the above; of the scale and the options `BottleneckAdapter` says it.
        NotImplementedError: when called.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        prefix_length: int = 30,
        bottleneck: int = 512,
        scale: float | str = 4.0,
        reparametrization: int | None = 800,
        prefix_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_heads("MAM", d_model, heads)
        check_size("MAM", "prefix_length", prefix_length)
        check_size("MAM", "bottleneck", bottleneck)
        if reparametrization is not None:
            check_size("MAM", "reparametrization", reparametrization, "None or ")
        check_probability("MAM", "prefix_dropout", prefix_dropout)
        self.prefix = PrefixAdapter(
            d_model,
            heads,
            prefix_length,
            reparametrization=reparametrization,
            dropout=prefix_dropout,
            device=device,
            dtype=dtype,
        )
        self.parallel = ParallelAdapter(d_model, bottleneck, scale=scale, device=device, dtype=dtype, **options)

    def reset_parameters(self) -> None:
        """Draw both anew."""
        self.prefix.reset_parameters()
        self.parallel.reset_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the two adapters stand at two places of the layer."""
        where = "call .prefix(query, key, value) at the attention and .parallel(x, ffn(x)) beside the feed-forward"
        raise NotImplementedError(f"MAM: has no forward of its own; {where}")

    def extra_repr(self) -> str:
        return f"{self.prefix.d_model}, {self.prefix.heads}"
