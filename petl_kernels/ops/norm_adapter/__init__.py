"""The adapter branch of a pre-norm transformer: layer norm, adapter and residual as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast_enabled
from petl_kernels.ops.bottleneck_adapter import fastest_on_cpus
from petl_kernels.ops.norm_adapter.reference import norm_adapter as reference
from petl_kernels.ops.norm_adapter.validation import validate

__all__ = ["norm_adapter"]


def _fake_forward(
    x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, residual, scale, alpha, activation, norm, eps, save
):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], w_up.shape[0]), dtype=dtype)
    z = x.new_empty((*x.shape[:-1], w_down.shape[0]) if save else (0,))
    return y, z, *new_statistics(x, y.numel() // y.shape[-1] if save else 0, norm)


def _fake_backward(
    g, x, z, mean, rstd, ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale, alpha, activation, norm, add_g, needs
):
    dx = z.new_empty((*g.shape[:-1], w_down.shape[1]) if needs[0] else (0,))
    return dx, *new_gradients((ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale), needs[1:], z)


def _sizes(x: Tensor, ln_weight: Any, ln_bias: Any, w_down: Tensor, *_: Any) -> tuple[int, ...]:
    r, d = w_down.shape
    return x.numel() // d, d, r


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=fastest_on_cpus, sizes=_sizes)

# `scale` and `alpha` are the tensor and the float form of the scale. z is the pre-activation [..., r] in x's dtype,
# mean and rstd are [rows] (no mean of RMSNorm), all three empty when `save` is false. y has the promoted dtype of x
# and residual. Outputs are contiguous.
FORWARD = OP.direction(
    "norm_adapter_fwd(Tensor x, Tensor? ln_weight, Tensor? ln_bias, Tensor w_down, Tensor? b_down, Tensor w_up, "
    "Tensor? b_up, Tensor? residual, Tensor? scale, float alpha, str activation, str norm, float eps, bool save) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    "forward",
    _fake_forward,
)
# `add_g`: the residual was x itself. `needs` = (x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, scale): a gradient
# that is not needed comes back as an empty tensor of z's dtype. x is None where neither it nor ln_weight nor w_down
# needs one.
BACKWARD = OP.direction(
    "norm_adapter_bwd(Tensor g, Tensor? x, Tensor z, Tensor mean, Tensor rstd, Tensor? ln_weight, Tensor? ln_bias, "
    "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? scale, float alpha, str activation, str norm, "
    "bool add_g, bool[] needs) -> (Tensor dx, Tensor dln_weight, Tensor dln_bias, Tensor dw_down, Tensor db_down, "
    "Tensor dw_up, Tensor db_up, Tensor dscale)",
    "backward",
    _fake_backward,
)


class _NormAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *rest):
        *parameters, residual, scale, alpha, activation, norm, eps, sequential, save, impl = rest
        added = x if sequential else residual
        y, *kept = FORWARD(impl, x, *parameters, added, scale, alpha, activation, norm, eps, save)
        ln_weight, _, w_down, *_ = parameters
        read = any(t is not None and t.requires_grad for t in (x, ln_weight, w_down))
        # The normalised rows are made again from x and two numbers per row.
        ctx.save_for_backward(x if read else None, *kept, *parameters, scale)
        ctx.options = (alpha, activation, norm, sequential)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads, None, None, None, None, None, None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x, the parameters, residual and scale, None where not needed."""
    *needs, residual, scale = ctx.needs_input_grad[:9]
    needs = [*needs, scale]
    grads: list[Tensor | None] = [None] * 8
    if True in needs:
        raw = BACKWARD(ctx.impl, g, *saved, *ctx.options, needs)
        grads = [grad if need else None for grad, need in zip(raw, needs)]
    grads.insert(7, g.to(ctx.residual_dtype) if residual else None)
    return grads


def _prepare(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    norm: str = "layer",
) -> tuple[Any, ...]:
    """The call that the implementations see: validated."""
    validate(x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, residual, scale, activation, norm, eps)
    return x, ln_weight, ln_bias, w_down, b_down, w_up, b_up, residual, scale, activation, norm, eps


OP.prepare = _prepare


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """What eager gives: the dtype of the branch, which autocast decides on, promoted with the residual's."""
    own = torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) and x.dtype != torch.float64 else x.dtype
    return own if residual is None else torch.promote_types(own, residual.dtype)


def norm_adapter(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    norm: str = "layer",
    impl: str | None = None,
) -> Tensor:
    """The adapter of a pre-norm block: `residual + scale * (act(norm(x) w_down^T + b_down) w_up^T + b_up)`.

    He et al. 2021 (arXiv:2110.04366, table 1): with `residual=x` the adapter is a residual block of its own; with the
    output of a sublayer it is parallel to that sublayer. The normalised tensor is never stored. Differentiable once.

    Args:
        x: input [..., d_in], float32, bfloat16, float16 or float64, any strides. Under autocast the norm takes it as it
            is, and the result has the dtype that eager's would have.
        ln_weight: scale of the norm [d_in], or None; it and ln_bias share a dtype.
        ln_bias: shift of the layer norm [d_in], or None; RMSNorm has none.
        w_down: down-projection [r, d_in]. Parameters share one dtype, which may differ from x's.
        b_down: its bias [r], or None.
        w_up: up-projection [d_out, r].
        b_up: its bias [d_out], or None; the scale multiplies it too.
        residual: what is added, [..., d_out]: x itself, another tensor, or None.
        eps: what is added to the variance or mean square, at least 0.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu" (0.01) or "identity".
        scale: a float, a learned scalar [] or [1], or a learned vector [d_out].
        norm: "layer" (Ba et al. 2016, arXiv:1607.06450) or "rms" (Zhang and Sennrich 2019, arXiv:1910.07467).
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d_out], contiguous, in x's dtype, promoted with residual's. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, activation, norm, eps or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(
        x,
        ln_weight,
        ln_bias,
        w_down,
        b_down,
        w_up,
        b_up,
        residual=residual,
        eps=eps,
        activation=activation,
        scale=scale,
        norm=norm,
    )
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    tensor, alpha = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    parameters = call[1:7]
    options = (alpha, activation, norm, float(eps))
    if torch.is_grad_enabled():
        save = any(t is not None and t.requires_grad for t in (x, *parameters, tensor))
        sequential = residual is x
        other = None if sequential else residual
        y = _NormAdapter.apply(x, *parameters, other, tensor, *options, sequential, save, chosen)
    else:
        y = FORWARD(chosen, x, *parameters, residual, tensor, *options, False)[0]
    return y.to(_result_dtype(x, residual))
