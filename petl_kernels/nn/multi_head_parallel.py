"""The multi-head parallel adapter of He et al.: prefix tuning with a ReLU in the place of the softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice, check_heads, check_number, check_probability, check_size
from petl_kernels.nn.bottleneck_adapter import INITS
from petl_kernels.nn.layer_norm import LayerNorm
from petl_kernels.ops._validate import check_tensor

_INITS = ("bert", "lora")


class MultiHeadParallelAdapter(nn.Module):
    """`scale * relu(q_h P_k,h^T) P_v,h` for every head h, with `q = W_q LN(x)`: what is added to the heads' outputs.

    He et al. 2021 (arXiv:2110.04366, table 1, "multi-head PA"), as in their code: x is the input of the attention
    layer, LN a trained layer norm of the adapter's own, W_q the layer's own frozen query projection, and q is *not*
    scaled by 1 / sqrt(d_head). The result is added to the concatenated heads before the output projection:
    `out_proj(heads + adapter(x, q_proj))`.

    Heads have weights of their own, which one call of `petl_kernels.bottleneck_adapter` cannot take. A call per head is
    19 launches at 16 heads and 45 with the backward pass; a block-diagonal weight is 16 times the arithmetic. So the
    two products are `torch.bmm` over heads, with batch and tokens together as rows: 6 launches, layer norm and W_q
    included, and 15 with the backward pass, whatever the number of heads.

    Args:
        d_model: width d of the attention layer.
        heads: its number of heads, a divisor of d.
        bottleneck: width r of each head's bottleneck.
        scale: a float.
        dropout: of the elements after the ReLU in training.
        init: of P_k and P_v. "bert": normal of std 0.02, as He et al. initialise adapters of attention; the adapter
            starts small, not as zero. "lora": P_k Kaiming uniform (a = sqrt 5) per head and P_v zero, so that it starts
            as zero. The layer norm starts as PyTorch's.
        device, dtype: of the parameters; "meta" defers memory until `to_empty` and `reset_parameters`.

    Shapes: x [..., d] -> [..., d]; key, value [heads, r, d/heads]; norm.weight, norm.bias [d].

    Parameters: 2 r d + 2 d.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        bottleneck: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        init: str = "bert",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads("MultiHeadParallelAdapter", d_model, heads)
        check_size("MultiHeadParallelAdapter", "bottleneck", bottleneck)
        check_number("MultiHeadParallelAdapter", "scale", scale)
        check_probability("MultiHeadParallelAdapter", "dropout", dropout)
        check_choice("MultiHeadParallelAdapter", "init", init, _INITS)
        self.d_model, self.heads, self.d_head, self.bottleneck = d_model, heads, d_model // heads, bottleneck
        self.scale, self.dropout, self.init = float(scale), float(dropout), init
        self.norm = LayerNorm(d_model, device=device, dtype=dtype)
        shape = (heads, bottleneck, self.d_head)
        self.key = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw P_k and P_v by `init`; the layer norm becomes 1 and 0."""
        self.norm.reset_parameters()
        # As rows: the fan-in of a head is d_head, not what PyTorch makes of three dimensions.
        INITS[self.init](self.key.view(-1, self.d_head), self.value)

    def forward(self, x: Tensor, q_proj: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum that all heads get, concatenated.

        Args:
            x: the input of the attention layer, [batch, tokens, d] or any [..., d], floating point.
            q_proj: the attention layer's query projection, [..., d] -> [..., d], normally its frozen `nn.Linear`. Not
                kept by the adapter. It must not scale: an attention layer that scales its queries does so after it.

        Returns:
            [..., d] in the dtype that q_proj gives; P is cast to it.

        Raises:
            ValueError: x is not d wide or not on the adapter's device; q_proj changes the shape.
            TypeError: x is not a floating-point tensor, or float64 meets another dtype; q_proj is not callable.
        """
        check_tensor("MultiHeadParallelAdapter", "x", x, self.key, "the adapter")
        if x.shape[-1:] != (self.d_model,):
            wanted = f"[..., d_model] = [..., {self.d_model}]"
            raise ValueError(f"MultiHeadParallelAdapter: x must be {wanted}, got {list(x.shape)}")
        if not callable(q_proj):
            raise TypeError(f"MultiHeadParallelAdapter: q_proj must be callable, got {type(q_proj).__name__}")
        query = q_proj(self.norm(x))
        if query.shape != x.shape:
            wanted = f"must give x's shape {list(x.shape)}"
            raise ValueError(f"MultiHeadParallelAdapter: q_proj {wanted}, got {list(query.shape)}")
        rows = query.reshape(-1, self.heads, self.d_head).transpose(0, 1)
        hidden = F.relu(torch.bmm(rows, self.key.to(query.dtype).transpose(1, 2)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        # Scaled where it is small: r x d numbers instead of one per token and channel.
        value = self.value if self.scale == 1.0 else self.value * self.scale
        return torch.bmm(hidden, value.to(query.dtype)).transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        text = f"{self.d_model}, {self.heads}, {self.bottleneck}, scale={self.scale}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return f"{text}, init={self.init!r}"
