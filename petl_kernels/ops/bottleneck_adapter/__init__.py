"""The bottleneck adapter: down-projection, nonlinearity, up-projection, scale and residual as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._dropout import new_seed
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast
from petl_kernels.ops.bottleneck_adapter.reference import bottleneck_adapter as reference
from petl_kernels.ops.bottleneck_adapter.validation import validate

__all__ = ["bottleneck_adapter"]


def _fake_forward(x, w_down, b_down, w_up, b_up, residual, scale, gate, seed, dropout, alpha, activation, save_z):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], w_up.shape[0]), dtype=dtype)
    return y, x.new_empty((*x.shape[:-1], w_down.shape[0]) if save_z else (0,))


def _fake_backward(g, x, z, w_down, b_down, w_up, b_up, scale, gate, seed, dropout, alpha, activation, add_g, needs):
    dx = z.new_empty((*g.shape[:-1], w_down.shape[1]) if needs[0] else (0,))
    return dx, *new_gradients((w_down, b_down, w_up, b_up, scale, gate), needs[1:], z)


def fastest_on_cpus(x: Tensor, *_: Any) -> tuple[str, ...]:
    """What "auto" takes of the ops that have a bottleneck, from benchmarks/results."""
    # Not recorded: where torch multiplies bfloat16 in AMX tiles, which these kernels do not use.
    return () if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else ("cpp",)


def _sizes(x: Tensor, w_down: Tensor, *_: Any) -> tuple[int, ...]:
    r, d = w_down.shape
    return x.numel() // d, d, r


OP = Op(__name__, impls=("cpp", "triton", "cuda", "cuda_sm90"), preference=fastest_on_cpus, sizes=_sizes)

# `scale` and `alpha` are the tensor and the float form of the scale, the float being 1.0 beside a tensor. The gate is
# [..., 1]. `seed` is there if and only if something is dropped. z is the pre-activation [..., r] in x's dtype, of a
# softmax its value, which is all that its derivative asks for; empty when `save_z` is false. Outputs are contiguous.
FORWARD = OP.direction(
    "bottleneck_adapter_fwd(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? residual, "
    "Tensor? scale, Tensor? gate, Tensor? seed, float dropout, float alpha, str activation, bool save_z) "
    "-> (Tensor y, Tensor z)",
    "forward",
    _fake_forward,
)
# `add_g`: the residual was x itself, so that dx = g + dz w_down. `needs` = (x, w_down, b_down, w_up, b_up, scale,
# gate): a gradient that is not needed comes back as an empty tensor of z's dtype; x is None unless w_down needs it.
BACKWARD = OP.direction(
    "bottleneck_adapter_bwd(Tensor g, Tensor? x, Tensor z, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
    "Tensor? scale, Tensor? gate, Tensor? seed, float dropout, float alpha, str activation, bool add_g, bool[] needs) "
    "-> (Tensor dx, Tensor dw_down, Tensor db_down, Tensor dw_up, Tensor db_up, Tensor dscale, Tensor dgate)",
    "backward",
    _fake_backward,
)


class _BottleneckAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, residual, scale, gate, seed, options, sequential, save_z, impl):
        added = x if sequential else residual
        y, z = FORWARD(impl, x, w_down, b_down, w_up, b_up, added, scale, gate, seed, *options, save_z)
        # x is N x d and is kept only for dw_down; z is N x r.
        ctx.save_for_backward(x if w_down.requires_grad else None, z, w_down, b_down, w_up, b_up, scale, gate, seed)
        ctx.options = (*options, sequential)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads, None, None, None, None, None


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of x, w_down, b_down, w_up, b_up, residual, scale and gate, None where not needed."""
    x, w_down, b_down, w_up, b_up, residual, scale, gate = ctx.needs_input_grad[:8]
    needs = (x, w_down, b_down, w_up, b_up, scale, gate)
    grads: list[Tensor | None] = [None] * 7
    if True in needs:
        raw = BACKWARD(ctx.impl, g, *saved, *ctx.options, needs)
        grads = [grad if need else None for grad, need in zip(raw, needs)]
    grads.insert(5, g.to(ctx.residual_dtype) if residual else None)
    return grads


def _prepare(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, the gate [..., 1], and under autocast x in its dtype."""
    validate(x, w_down, b_down, w_up, b_up, residual, scale, gate, seed, dropout, activation)
    if gate is not None:
        gate = gate.expand(*x.shape[:-1], 1)
    if not dropout:
        seed = None
    # A residual stays as it is under autocast and promotes the sum, as eager's addition does.
    return autocast(x), w_down, b_down, w_up, b_up, residual, scale, gate, seed, dropout, activation


OP.prepare = _prepare


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """A bottleneck adapter: `residual + gate * scale * (drop(act(x w_down^T + b_down)) w_up^T + b_up)`.

    Houlsby et al. 2019 (arXiv:1902.00751, section 2.1) with `residual=x`; He et al. 2021 (arXiv:2110.04366, table 1)
    with another residual, or with none and the sum left to the caller. Scale and gate multiply `b_up` too.
    Differentiable once.

    Args:
        x: input [..., d_in], float32, bfloat16, float16 or float64, any strides. Under autocast it is first cast to
            the autocast dtype.
        w_down: down-projection [r, d_in]. Parameters share one dtype, which may differ from x's (float32 masters
            beside bfloat16 activations); kernels cast as they read and accumulate in float32.
        b_down: its bias [r], or None.
        w_up: up-projection [d_out, r].
        b_up: its bias [d_out], or None.
        residual: what is added, [..., d_out]: x itself (sequential), another tensor (parallel), or None.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu" (0.01), "identity", or
            "softmax", over the bottleneck: attention to r prefix tokens (He et al., section 3.1).
        scale: a float, a learned scalar [] or [1], or a learned vector [d_out].
        gate: a factor per row, any shape that broadcasts to [..., 1]: of every sample (UniPELT, arXiv:2110.07577), of
            every token, or stochastic depth. Of any floating-point dtype, None for 1.
        dropout: probability in [0, 1) of dropping an element of the bottleneck; the others are divided by 1 - dropout.
            No mask is saved: the backward draws the same numbers again.
        seed: int64, [] or [1], on x's device: the same seed drops the same elements, on every implementation. It is
            read where the kernels run: a captured graph draws anew when its value changes. None draws one from torch's
            generator, which `torch.manual_seed` and checkpointing restore (the reference then runs PyTorch's dropout).
        impl: "reference", "cpp", "triton", "cuda", "cuda_sm90" (16-bit dtypes on compute capability 9.0), or None for
            the fastest known; see `explain` and `use_impl`.

    Returns:
        [..., d_out], contiguous, in x's dtype, promoted with residual's. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, activation, probability or impl that does not fit.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    sequential = residual is x
    call = _prepare(x, w_down, b_down, w_up, b_up, residual, activation, scale, gate, dropout, seed)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    sequential = sequential and call[0] is x  # an autocast copy of x is another tensor than the residual
    tensor, alpha = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    x, gate, seed = call[0], call[7], call[8]
    if dropout and seed is None:
        seed = new_seed(x.device)
    numbers = (float(dropout), alpha, activation)
    if not torch.is_grad_enabled():
        return FORWARD(chosen, x, w_down, b_down, w_up, b_up, residual, tensor, gate, seed, *numbers, False)[0]
    save_z = any(t is not None and t.requires_grad for t in (x, w_down, b_down, w_up, tensor, gate))
    other = None if sequential else residual
    return _BottleneckAdapter.apply(
        x, w_down, b_down, w_up, b_up, other, tensor, gate, seed, numbers, sequential, save_z, chosen
    )
