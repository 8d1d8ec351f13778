"""Adapter+: a bottleneck adapter with a learned scale per channel and stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petl_kernels.nn._check import check_probability
from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter


class AdapterPlus(BottleneckAdapter):
    """`x + scale * keep * (gelu(x w_down^T + b_down) w_up^T + b_up)`, with one learned scale per channel.

    Steitz and Roth 2024 (arXiv:2406.06820): in pre-LN vision transformers after the feed-forward part's residual sum,
    on the stream itself. `keep` is, in training, 0 for a sample with probability `drop_path` and 1 / (1 - drop_path)
    otherwise. 2 d r + 2 d + r parameters.

    Args:
        d_model, bottleneck: widths d and r; the paper has r = 8, the `adapters` library d / 96.
        drop_path: probability of leaving the whole branch out, per sample (dimension 0 of x).
        options: what else `BottleneckAdapter` takes; weights start normal with std 1e-2, cut at two of them.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        d_model: int,
        bottleneck: int = 8,
        *,
        scale: float | str = "channel",
        drop_path: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(d_model, bottleneck, scale=scale, **options)
        check_probability("AdapterPlus", "drop_path", drop_path)
        self.drop_path = float(drop_path)

    def _gate(self, x: Tensor) -> Tensor | None:
        """Stochastic depth: of each sample, whether its branch is there."""
        if not self.training or self.drop_path == 0:
            return None
        keep = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return keep.bernoulli_(1 - self.drop_path) / (1 - self.drop_path)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop_path={self.drop_path}"
