"""Adapters that absorb the norm beside them: after their sum, or before their branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.nn._check import check_choice
from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter
from petl_kernels.ops._adapter_norm import NORMS
from petl_kernels.ops.adapter_norm import adapter_norm
from petl_kernels.ops.norm_adapter import norm_adapter


class _WithNorm(BottleneckAdapter):
    def __init__(
        self, d_model: int, bottleneck: int, *, norm: str | nn.Module = "layer", eps: float = 1e-5, **options: Any
    ):
        super().__init__(d_model, bottleneck, **options)
        name = type(self).__name__
        if isinstance(norm, nn.Module):
            if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or tuple(norm.normalized_shape) != (d_model,):
                raise ValueError(f"{name}: norm must be {NORMS} or a LayerNorm or RMSNorm of [{d_model}], got {norm!r}")
            self.norm: nn.Module = norm
        else:
            check_choice(name, "norm", norm, NORMS)
            make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
            self.norm = make(d_model, eps=eps, device=options.get("device"), dtype=options.get("dtype"))

    def _random(self) -> bool:
        return self.training and self.dropout > 0

    def _shared(self) -> dict[str, Any]:
        """What both ops take: the adapter's parameters and the norm's."""
        norm: Any = self.norm
        rms = isinstance(norm, nn.RMSNorm)
        eps = norm.eps if norm.eps is not None else torch.finfo(self.w_down.dtype).eps  # RMSNorm's default
        return dict(
            w_down=self.w_down,
            b_down=self.b_down,
            w_up=self.w_up,
            b_up=self.b_up,
            ln_weight=norm.weight,
            ln_bias=None if rms else norm.bias,
            eps=eps,
            activation=self.activation,
            scale=self.scale,
            norm="rms" if rms else "layer",
            impl=self.impl,
        )


class AdapterNorm(_WithNorm):
    """The adapter site of a post-norm block: `norm(residual + x + scale * up(act(down(x))))`.

    Houlsby et al. 2019 (arXiv:1902.00751, figure 2) in one call of `petl_kernels.adapter_norm`: x is the sublayer's
    output, residual its input. The parallel form (arXiv:2110.04366) runs beside the sublayer: x is the sublayer's
    input, which is in the sum too, and residual its output.

    Args:
        d_model, bottleneck: widths d and r.
        norm: "layer", "rms", or the model's own `nn.LayerNorm` or `nn.RMSNorm` of d channels, which is then shared.
        eps: of a norm that is made here.
        options: what else `BottleneckAdapter` takes but `form`, which makes no difference here. While dropout is at
            work the adapter is a call of `bottleneck_adapter`, and the norm one of its own.

    Shapes: x, residual [..., d] -> [..., d]; beside the adapter's parameters norm.weight [d] and norm.bias [d].

    Raises:
        ValueError: an argument outside the above.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adapt x [..., d], add residual [..., d] where it is given, normalise."""
        if self._random():
            y = self._adapt(x, x)
            return self.norm(y if residual is None else y + residual)
        return adapter_norm(x, residual, **self._shared())


class NormAdapter(_WithNorm):
    """The adapter of a pre-norm block: `residual + scale * up(act(down(norm(x))))`.

    In one call of `petl_kernels.norm_adapter` (He et al. 2021, arXiv:2110.04366, table 1). In the sequential form the
    residual is x, in the parallel form the output of the sublayer beside which the adapter runs, or None.

    Args:
        d_model, bottleneck: widths d and r.
        norm: "layer", "rms", or the model's own `nn.LayerNorm` or `nn.RMSNorm` of d channels, which is then shared.
        eps: of a norm that is made here.
        options: what else `BottleneckAdapter` takes. While dropout is at work the adapter is a call of
            `bottleneck_adapter` on what the norm gives.

    Shapes: x, residual [..., d] -> [..., d]; beside the adapter's parameters norm.weight [d] and norm.bias [d].

    Raises:
        ValueError: an argument outside the above.
    """

    def _adapt(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._random():
            return super()._adapt(self.norm(x), residual)
        return norm_adapter(x, residual=residual, **self._shared())
