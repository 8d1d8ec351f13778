"""The adapter site of a post-norm transformer: adapter, residual and layer norm as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._adapter_norm import new_statistics
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast, autocast_enabled
from petl_kernels.ops.adapter_norm.reference import adapter_norm as reference
from petl_kernels.ops.adapter_norm.validation import validate
from petl_kernels.ops.bottleneck_adapter import fastest_on_cpus

__all__ = ["adapter_norm"]


def _fake_forward(
    x,
    residual,
    hidden,
    w_down,
    b_down,
    w_up,
    b_up,
    ln_weight,
    ln_bias,
    scale,
    alpha,
    activation,
    norm,
    eps,
    save,
    store,
):
    y = (x if hidden is None else hidden).new_empty((*x.shape[:-1], w_up.shape[0]))
    z = x.new_empty((*x.shape[:-1], w_down.shape[0]) if save else (0,))
    statistics = new_statistics(x, y.numel() // y.shape[-1] if save else 0, norm, centred=not store)
    return y, z, *statistics, y.new_empty(y.shape if store else (0,))


def _fake_backward(
    g,
    x,
    residual,
    hidden,
    z,
    mean,
    rstd,
    normal,
    w_down,
    b_down,
    w_up,
    b_up,
    ln_weight,
    ln_bias,
    scale,
    alpha,
    activation,
    norm,
    add_g,
    needs,
):
    dx = z.new_empty((*g.shape[:-1], w_down.shape[1]) if needs[0] else (0,))
    dresidual = g.new_empty(g.shape if needs[1] else (0,))
    parameters = (w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale)
    return dx, dresidual, *new_gradients(parameters, needs[2:], z)


def _sizes(x: Tensor, residual: Any, hidden: Any, w_down: Tensor, *_: Any) -> tuple[int, ...]:
    r, d = w_down.shape
    return x.numel() // d, d, r


OP = Op(__name__, impls=("cpp", "triton", "cuda"), preference=fastest_on_cpus, sizes=_sizes)

# `hidden` is None where x itself is the term of the sum; the terms have the dtype of y, x its own. `scale` and `alpha`
# are the tensor and the float form of the scale. z is the pre-activation [..., r] in x's dtype, mean and rstd are
# [rows] (no mean of RMSNorm), all three empty when `save` is false. With `store` normal is (sum - mean) rstd and there
# is no mean; else it is empty. Outputs are contiguous.
FORWARD = OP.direction(
    "adapter_norm_fwd(Tensor x, Tensor? residual, Tensor? hidden, Tensor w_down, Tensor? b_down, Tensor w_up, "
    "Tensor? b_up, Tensor? ln_weight, Tensor? ln_bias, Tensor? scale, float alpha, str activation, str norm, "
    "float eps, bool save, bool store) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd, Tensor normal)",
    "forward",
    _fake_forward,
)
# `needs` = (x, the sum, w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale): a gradient that is not needed comes
# back as an empty tensor. dresidual is the gradient of the sum, and so of residual and of hidden; dx includes it where
# x was a term (`add_g`). Where normal is not empty the terms are not read: residual and hidden are None, and so is x
# unless w_down needs a gradient.
BACKWARD = OP.direction(
    "adapter_norm_bwd(Tensor g, Tensor? x, Tensor? residual, Tensor? hidden, Tensor z, Tensor mean, Tensor rstd, "
    "Tensor normal, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? ln_weight, Tensor? ln_bias, "
    "Tensor? scale, float alpha, str activation, str norm, bool add_g, bool[] needs) -> (Tensor dx, Tensor dresidual, "
    "Tensor dw_down, Tensor db_down, Tensor dw_up, Tensor db_up, Tensor dln_weight, Tensor dln_bias, Tensor dscale)",
    "backward",
    _fake_backward,
)


# Implementations that keep the normalised rows for the backward. On a CPU the bound is arithmetic, and forming the sum
# again a sixth more of it. On a GPU the bound is memory: to keep them is a fourth pass beside the forward's three, and
# one less in the backward, where Triton reads the terms of the sum and the CUDA kernels these.
_STORING = ("cpp", "cuda")


class _AdapterNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, hidden, *rest):
        *parameters, scale, alpha, activation, norm, eps, save, store, impl = rest
        options = (scale, alpha, activation, norm, eps, save, store)
        y, *kept = FORWARD(impl, x, residual, hidden, *parameters, *options)
        sequential = hidden is None
        # The normalised rows, or what the sum is formed again from: of N x d two tensors either way.
        branch = x if parameters[0].requires_grad or (sequential and not store) else None
        terms = (None, None) if store else (residual, hidden)
        ctx.save_for_backward(branch, *terms, *kept, *parameters, scale)
        ctx.options = (alpha, activation, norm, sequential)
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads, None, None, None, None, None, None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x, residual, hidden, the parameters and scale, None where not needed."""
    x, residual, hidden, *rest = ctx.needs_input_grad[:10]
    needs = (x, residual or hidden, *rest)
    raw = BACKWARD(ctx.impl, g, *saved, *ctx.options, needs)
    dx, dsum, *grads = [grad if need else None for grad, need in zip(raw, needs)]
    return [dx, dsum if residual else None, dsum if hidden else None, *grads]


def _prepare(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    hidden: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    norm: str = "layer",
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, the terms in one dtype, x as autocast wants it."""
    validate(x, residual, w_down, b_down, w_up, b_up, ln_weight, ln_bias, hidden, scale, activation, norm, eps)
    if hidden is x:
        hidden = None
    branch, term = autocast(x), x if hidden is None else hidden
    dtype = term.dtype
    if residual is not None and residual.dtype != dtype:
        dtype = torch.promote_types(dtype, residual.dtype)
    if x.device.type == "cuda" and dtype != torch.float64 and autocast_enabled(x):
        dtype = torch.float32  # as autocast makes the norm's input on GPUs, not on the CPU
    term, residual = term.to(dtype), None if residual is None else residual.to(dtype)
    apart = None if hidden is None and term is branch else term
    return branch, residual, apart, w_down, b_down, w_up, b_up, ln_weight, ln_bias, scale, activation, norm, eps


OP.prepare = _prepare


def adapter_norm(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    hidden: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    norm: str = "layer",
    impl: str | None = None,
) -> Tensor:
    """An adapter site of a post-norm transformer: `norm(residual + hidden + scale * up(act(down(x))))`.

    Houlsby et al. 2019 (arXiv:1902.00751, figure 2): x is the output of a sublayer, `hidden` is x, and residual is the
    sublayer's input. With `hidden` given the branch has an input of its own (the parallel adapter of He et al. 2021,
    arXiv:2110.04366, is the call with x and residual exchanged, since both are terms; Pfeiffer et al. 2021,
    arXiv:2005.00247, feed it the normalised sum). Differentiable once. The backward keeps x, the pre-activation
    [..., r] and the normalised sum, in the place of which "triton" keeps residual and hidden.

    Args:
        x: input of the branch [..., d_in], float32, bfloat16, float16 or float64, any strides. Under autocast the
            branch takes it in the autocast dtype.
        residual: a term of the sum [..., d], or None.
        w_down: down-projection [r, d_in]. Parameters share one dtype, which may differ from x's.
        b_down: its bias [r], or None.
        w_up: up-projection [d, r].
        b_up: its bias [d], or None; the scale multiplies it too.
        ln_weight: scale of the norm [d], or None; it and ln_bias share a dtype.
        ln_bias: shift of the layer norm [d], or None; RMSNorm has none.
        hidden: the term of the sum beside residual [..., d]; x itself where it is None.
        eps: what is added to the variance or mean square, at least 0.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu" (0.01) or "identity".
        scale: a float, a learned scalar [] or [1], or a learned vector [d].
        norm: "layer" (Ba et al. 2016, arXiv:1607.06450) or "rms" (Zhang and Sennrich 2019, arXiv:1910.07467).
        impl: "reference", "cpp", "triton", "cuda", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d], contiguous, in the promoted dtype of the sum's terms (float32 under CUDA autocast, as `F.layer_norm`).
        Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, activation, norm, eps or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    call = _prepare(
        x,
        residual,
        w_down,
        b_down,
        w_up,
        b_up,
        ln_weight,
        ln_bias,
        hidden=hidden,
        eps=eps,
        activation=activation,
        scale=scale,
        norm=norm,
    )
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    tensor, alpha = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    tensors = (*call[:9], tensor)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = (alpha, activation, norm, float(eps), save, save and chosen in _STORING)
    if not torch.is_grad_enabled():
        return FORWARD(chosen, *tensors, *options)[0]
    return _AdapterNorm.apply(*tensors, *options, chosen)
