"""AdamW in place on chosen channels of many tensors, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._channel_step import Tensors, check_step, per_tensor
from petl_kernels.ops._op import Op

__all__ = ["channel_adamw_"]


def _preference(params: Tensors, *_: Any) -> tuple[str, ...]:
    # From benchmarks/optimizer.py; on a GPU nothing is measured, and "auto" takes nothing on trust.
    return ("cpp",) if params and params[0].device.type == "cpu" else ()


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=_preference)

# Hyper-parameters have one entry per tensor. `channels` is None where all of a tensor is updated.
UPDATE = OP.direction(
    "channel_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor?[] channels, int[] dims, float[] lr, float[] beta1, float[] beta2, float[] eps, "
    "float[] weight_decay, bool[] maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    "update",
    lambda *call: None,
)


def _prepare(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    *,
    lr: float | Sequence[float],
    beta1: float | Sequence[float],
    beta2: float | Sequence[float],
    eps: float | Sequence[float],
    weight_decay: float | Sequence[float],
    maximize: bool | Sequence[bool] = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, with one hyper-parameter of each kind per tensor."""
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_step(OP.name, params, grads, states, steps, channels, dims, grad_scale, found_inf)
    numbers = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize)
    listed = [per_tensor(OP.name, name, value, len(params)) for name, value in numbers.items()]
    return params, grads, exp_avgs, exp_avg_sqs, steps, channels, dims, *listed, grad_scale, found_inf


OP.prepare = _prepare


def channel_adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    channels: Sequence[Tensor | None],
    dims: Sequence[int],
    *,
    lr: float | Sequence[float],
    beta1: float | Sequence[float],
    beta2: float | Sequence[float],
    eps: float | Sequence[float],
    weight_decay: float | Sequence[float],
    maximize: bool | Sequence[bool] = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """One step of AdamW in place, on all or on chosen channels of each tensor; `petl_kernels.optim` is built on it.

    Loshchilov and Hutter 2017 (arXiv:1711.05101), with the formulas and the order of operations of
    `torch.optim.AdamW`, computed in float32 for bfloat16 and float16 and rounded once when stored. Elements that were
    not chosen are neither read nor written.

    Args:
        params: tensors of float32, bfloat16, float16 or float64, all on one device, distinct, of any strides in which
            no two elements share a place.
        grads: a dense gradient of each, of its shape and dtype; only the chosen channels are read.
        exp_avgs, exp_avg_sqs: the moments of what is updated, in the parameter's dtype: the parameter's shape, or
            [k, d_in] (dim 0), [d_out, k] (dim 1), [k] (a vector).
        steps: how many steps each has had, float32 [].
        channels: distinct int64 indices [k] of rows, columns or a vector's elements; None for the whole tensor.
        dims: which dimension channels index, 0 or 1; ignored where channels is None.
        lr, beta1, beta2, eps, weight_decay, maximize: one number, or a list with one per tensor.
        grad_scale: float32, one element; gradients are divided by it. They are not written to.
        found_inf: float32, one element; where it is not zero nothing changes.
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known.

    Raises:
        ValueError: lists of different lengths; a shape, device, dim or channel that does not fit; a tensor twice.
        TypeError: not a tensor, complex, sparse, or of another dtype than its parameter.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why.
    """
    call = _prepare(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        channels,
        dims,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    with torch.no_grad():
        UPDATE(OP.select(impl, *call), *call)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])
