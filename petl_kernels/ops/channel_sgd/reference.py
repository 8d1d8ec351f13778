"""The specification of `channel_sgd_`: plain PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Sequence[float],
    momentum: Sequence[float],
    dampening: Sequence[float],
    weight_decay: Sequence[float],
    nesterov: Sequence[bool],
    maximize: Sequence[bool],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step of SGD on the channels of each tensor: gathered, updated as torch.optim.SGD would, put back.

    The steps of `torch.optim.sgd._single_tensor_sgd` in its order; 16-bit tensors are computed in float32.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, (param, buffer, step) in enumerate(zip(params, momentum_buffers, steps)):
        index, dim = channels[i], dims[i]
        dtype = torch.float32 if param.dtype.itemsize == 2 else param.dtype
        chosen = (t if index is None else t.index_select(dim, index) for t in (param, grads[i]))
        weight, grad = (t.to(dtype) for t in chosen)
        if grad_scale is not None:
            grad = grad / grad_scale.to(dtype)
        if maximize[i]:
            grad = -grad
        if weight_decay[i] != 0:
            grad = grad.add(weight, alpha=weight_decay[i])
        held = None
        if momentum[i] != 0:
            first = step.item() == 0  # and is not dampened
            held = grad if first else (buffer.to(dtype) * momentum[i]).add(grad, alpha=1 - dampening[i])
            grad = grad.add(held, alpha=momentum[i]) if nesterov[i] else held
        weight = weight.add(grad, alpha=-lr[i]).to(param.dtype)
        # From here on nothing needs memory: a tensor's step is done as a whole or not at all.
        if held is not None:
            buffer.copy_(held)
            step.add_(1)
        if index is None:
            param.copy_(weight)
        else:
            param.index_copy_(dim, index, weight)
