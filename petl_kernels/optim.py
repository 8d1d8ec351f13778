"""Optimizers that update chosen channels of full weights in place, with state for those channels only.

Multiplying a gradient by a mask does not freeze the rest under AdamW: decoupled weight decay still moves it, and its
state is stored all the same. Here what was not chosen is neither read nor written, and has no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from petl_kernels._channel_optimizer import ChannelOptimizer, Channels
from petl_kernels.ops import channel_adamw, channel_sgd

__all__ = ["ChannelAdamW", "ChannelSGD", "Channels"]


class ChannelAdamW(ChannelOptimizer):
    """`torch.optim.AdamW` on whole tensors and on chosen channels of full weights, in place, in one call per step.

    Loshchilov and Hutter 2017 (arXiv:1711.05101). Of an entry `Channels(tensor, channels, dim)` only the chosen rows
    or columns are read, decayed and updated; all else stays bit-identical, whatever the gradient holds there. State is
    compact ([k, d_in] or [d_out, k], in the tensor's dtype), and the result that of `torch.optim.AdamW` on the
    gathered slices. 16-bit tensors are computed in float32, as by torch's fused implementation.

    `state_dict` records the channels of each entry; `load_state_dict` refuses others. With `torch.amp.GradScaler`
    gradients are unscaled inside the kernel and `.grad` keeps its scale; the scaler looks for infinities in the whole
    gradient.

    Args:
        params: tensors, `Channels`, ("name", either) pairs, or group dicts with a list of them. float32, bfloat16,
            float16 or float64, of any strides in which no two elements share a place.
        lr: learning rate, a float or a tensor of one element (which the host reads at every step).
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`. Decay is decoupled.
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `use_impl`.

    Raises:
        ValueError: a hyper-parameter out of range, channels that are not distinct or do not exist, a tensor given
            twice (also as a whole and with channels), a tensor that overlaps itself or is no leaf.
        TypeError: an entry that is neither tensor nor `Channels`; complex, integer or sparse.
    """

    _op = channel_adamw.OP
    _states = ("exp_avg", "exp_avg_sq")
    _numbers = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        impl: str | None = None,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, impl)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{type(self).__name__}: betas[{i}] must be in [0, 1), got {beta}")

    def _options(self, group: dict[str, Any]) -> list[float]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return [float(lr), float(beta1), float(beta2), group["eps"], group["weight_decay"], group["maximize"]]


class ChannelSGD(ChannelOptimizer):
    """`torch.optim.SGD` on whole tensors and on chosen channels of full weights, in place, in one call per step.

    As `ChannelAdamW`, with a compact momentum buffer, none where momentum is 0. Weight decay is an L2 term of the
    gradient of the chosen channels. Beside the buffer the state counts steps, because the first is not dampened.

    Args:
        params, lr, impl: as for `ChannelAdamW`.
        momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.

    Raises:
        ValueError, TypeError: as `ChannelAdamW`; Nesterov momentum with dampening or without momentum.
    """

    _op = channel_sgd.OP
    _states = ("momentum_buffer",)
    _numbers = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        impl: str | None = None,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        super().__init__(params, {**defaults, "nesterov": nesterov, "maximize": maximize}, impl)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"{type(self).__name__}: nesterov requires a momentum and zero dampening")

    def _has_state(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0
