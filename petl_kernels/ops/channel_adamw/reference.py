"""The specification of `channel_adamw_`: plain PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step of AdamW on the channels of each tensor: gathered, updated as torch.optim.AdamW would, put back.

    The steps of `torch.optim.adam._single_tensor_adam` in its order; 16-bit tensors are computed in float32.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, (param, state_1, state_2) in enumerate(zip(params, exp_avgs, exp_avg_sqs)):
        index, dim = channels[i], dims[i]
        dtype = torch.float32 if param.dtype.itemsize == 2 else param.dtype
        chosen = (t if index is None else t.index_select(dim, index) for t in (param, grads[i]))
        weight, grad, exp_avg, exp_avg_sq = (t.to(dtype) for t in (*chosen, state_1, state_2))
        if grad_scale is not None:
            grad = grad / grad_scale.to(dtype)
        if maximize[i]:
            grad = -grad
        step = steps[i].item() + 1
        weight = weight * (1 - lr[i] * weight_decay[i])
        exp_avg = exp_avg.lerp(grad, 1 - beta1[i])
        exp_avg_sq = (exp_avg_sq * beta2[i]).addcmul(grad, grad, value=1 - beta2[i])
        denom = (exp_avg_sq.sqrt() / (1 - beta2[i] ** step) ** 0.5).add(eps[i])
        weight = weight.addcdiv(exp_avg, denom, value=-(lr[i] / (1 - beta1[i] ** step)))
        weight = weight.to(param.dtype)
        # From here on nothing needs memory: a tensor's step is done as a whole or not at all.
        steps[i].add_(1)
        state_1.copy_(exp_avg)
        state_2.copy_(exp_avg_sq)
        if index is None:
            param.copy_(weight)
        else:
            param.index_copy_(dim, index, weight)
