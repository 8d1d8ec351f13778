"""VeRA: frozen, shared projections A and B with trained vectors d and b between and behind them.

    y = base(x) + b * (B (d * (A x)))

is an adapter without a nonlinearity whose up-projection is `B diag(d)` and whose scale per channel is b. The product
`M = g^T h`, which the gradient of b needs, gives that of the up-projection too, and with it that of d: five
products where the library makes four, but none of its passes over [N, d_out], nor the [N, d_out] that it saves.
(d in the down-projection would cost a sixth.) Forward + backward at 4096 x 768 in fp32, the frozen product included, is
1.12, 1.22 and 1.26 times faster at r = 8, 64 and 256 (2 cores, AVX-512).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.vera.layer import Linear
from torch import Tensor

from petl_kernels.integrations.peft import _tuner

# In bfloat16 and with instructions for it, the fifth product costs more than the passes: 0.95 of the library's speed.
FAST_BF16 = torch.cpu._is_avx512_bf16_supported()
LIBRARY = Linear
HOLDER = "vera_lambda_d"
layer_obstacle = _tuner.base_obstacle


def obstacle(layer: Any, name: str) -> str | None:
    """Why the library itself has to run this adapter in every call, or None."""
    down, up, between, behind = _parts(layer, name)
    for tensor in (down, up, between, behind):
        if not _tuner.plain(tensor):
            return f"its tensors are {type(tensor).__name__}, not plain ones"
    if down.shape[0] != between.numel() or up.shape[1] != between.numel():
        return "its shared projections are of another rank"  # the library's error
    return _tuner.dropout_obstacle(layer.vera_dropout[name])


def _parts(layer: Any, name: str) -> tuple[Any, Any, Any, Any]:
    """A and B in this layer's size, d and b."""
    down, up = layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
    return down, up, layer.vera_lambda_d[name], layer.vera_lambda_b[name]


class FusedLayer(_tuner.FusedTuner, Linear):
    """In front of the library's class: the same forward with one call of the op where one plain adapter is active."""

    def _fused(self, x: Tensor) -> Tensor | None:
        slower = x.dtype == torch.bfloat16 and x.device.type == "cpu" and FAST_BF16
        if slower and _tuner.OP.requested(self.fused_impl) is None:
            return None
        name = _tuner.lone_adapter(self, HOLDER) if _tuner.worthwhile(self, x) else None
        if name is None or layer_obstacle(self) or obstacle(self, name) or _tuner.random_now(self.vera_dropout[name]):
            return None
        down, up, between, behind = _parts(self, name)
        if not down.dtype == up.dtype == between.dtype == behind.dtype:
            return None
        return _tuner.low_rank(self, x, (down, None, up * between, None), behind)


def describe(layer: Any, name: str) -> str:
    """What is computed in one call."""
    down, up, *_ = _parts(layer, name)
    text = f"VeRA, {down.shape[1]} -> {down.shape[0]} -> {up.shape[0]}, vectors learned"
    return _tuner.except_in_training(text, layer.vera_dropout[name])
