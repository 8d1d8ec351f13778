"""Bottleneck adapters of many tasks in one call: each sample goes through the adapter of its own task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._refuse import differentiable_once
from petl_kernels.ops._validate import autocast
from petl_kernels.ops.adapter_bank.reference import adapter_bank as reference
from petl_kernels.ops.adapter_bank.validation import validate

__all__ = ["adapter_bank"]

Tensors = Sequence[Tensor]
PerTask = Tensors | Tensor


def gradient_shapes(trained: int, w_down: Tensor, w_up: Tensor) -> tuple[tuple[int, ...], ...]:
    """The shapes of dw_down, db_down, dw_up and db_up, stacked over the tasks that train."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    return (trained, r, d_in), (trained, r), (trained, d_out, r), (trained, d_out)


def _fake_forward(x, task, w_down, b_down, w_up, b_up, residual, scale, activation, save_z):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], w_up[0].shape[0]), dtype=dtype)
    return y, x.new_empty((*x.shape[:-1], w_down[0].shape[0]) if save_z else (0,))


def _fake_backward(g, x, z, task, w_down, w_up, scale, activation, add_g, trained, needs):
    dx = z.new_empty((*g.shape[:-1], w_down[0].shape[1]) if needs[0] else (0,))
    shapes = gradient_shapes(sum(trained), w_down[0], w_up[0])
    return dx, *(w_down[0].new_empty(s) if need else z.new_empty((0,)) for s, need in zip(shapes, needs[1:]))


def _preference(*_: Any) -> tuple[str, ...]:
    return ("cpp",)  # from benchmarks/results


def _sizes(x: Tensor, task: Tensor, w_down: Sequence[Tensor], *_: Any) -> tuple[int, ...]:
    r, d = w_down[0].shape
    return x.numel() // d, d, r, len(w_down)


OP = Op(__name__, impls=("cpp", "triton"), preference=_preference, sizes=_sizes)

# Lists have one entry per task, those of absent biases none. z is the pre-activation [..., r] in x's dtype, empty when
# `save_z` is false. Outputs are contiguous.
FORWARD = OP.direction(
    "adapter_bank_fwd(Tensor x, Tensor task, Tensor[] w_down, Tensor[] b_down, Tensor[] w_up, Tensor[] b_up, "
    "Tensor? residual, float scale, str activation, bool save_z) -> (Tensor y, Tensor z)",
    "forward",
    _fake_forward,
)
# `add_g`: the residual was x itself, so that dx = g + dz w_down. `trained` says of each task whether anything of it
# trains, `needs` = (x, w_down, b_down, w_up, b_up): the parameters' gradients are stacked over the tasks that train,
# zero for one that no sample has; what is not needed comes back as an empty tensor of z's dtype. x is None unless
# w_down needs it.
BACKWARD = OP.direction(
    "adapter_bank_bwd(Tensor g, Tensor? x, Tensor z, Tensor task, Tensor[] w_down, Tensor[] w_up, float scale, "
    "str activation, bool add_g, bool[] trained, bool[] needs) "
    "-> (Tensor dx, Tensor dw_down, Tensor db_down, Tensor dw_up, Tensor db_up)",
    "backward",
    _fake_backward,
)


def _trains(parameters: Tensors) -> bool:
    return any(p.requires_grad for p in parameters)


class _AdapterBank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, task, sizes, scale, activation, sequential, save_z, impl, *parameters):
        lists = _split(parameters, sizes)
        w_down, _, w_up, _ = lists
        y, z = FORWARD(impl, x, task, *lists, x if sequential else residual, scale, activation, save_z)
        # x is N x d and is kept only for dw_down; z is N x r.
        ctx.save_for_backward(x if _trains(w_down) else None, z, task, *w_down, *w_up)
        ctx.sizes, ctx.options = sizes, (scale, activation, sequential)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing recomputes them at each look
        grads = differentiable_once(OP.name, lambda: _gradients(ctx, g, saved), (g, *saved))
        return *grads[:2], *(None,) * 7, *grads[2:]


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """The lists of these sizes, of which `values` is the sum."""
    lists, start = [], 0
    for size in sizes:
        lists.append(values[start : start + size])
        start += size
    return lists


def _gradients(ctx: Any, g: Tensor, saved: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of x, residual and every parameter, None where not needed."""
    x, z, task, *weights = saved
    tasks = ctx.sizes[0]
    wanted = _split(ctx.needs_input_grad[9:], ctx.sizes)
    trained = [any(of[i] for of in wanted if of) for i in range(tasks)]
    needs = (ctx.needs_input_grad[0], *(any(of) for of in wanted))
    grads: list[Tensor | None] = [None, g.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None]
    if True not in needs:
        return grads + [None] * sum(ctx.sizes)
    w_down, w_up = weights[:tasks], weights[tasks:]
    dx, *stacks = BACKWARD(ctx.impl, g, x, z, task, w_down, w_up, *ctx.options, trained, needs)
    grads[0] = dx if needs[0] else None
    for stack, of, need in zip(stacks, wanted, needs[1:]):
        each = iter(stack.unbind() if need else ())
        for want, train in zip(of, trained):
            grad = next(each) if need and train else None
            grads.append(grad if want else None)
    return grads


def _listed(stack: Any) -> Any:
    """A tensor of all tasks as a list of each task's; anything else is what it is."""
    return stack.unbind() if isinstance(stack, Tensor) and stack.dim() else stack


def _prepare(
    x: Tensor,
    task: Tensor,
    w_down: PerTask,
    b_down: PerTask | None,
    w_up: PerTask,
    b_up: PerTask | None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """The call that the implementations see: validated, and under autocast with x in the autocast dtype."""
    w_down, b_down, w_up, b_up = map(_listed, (w_down, b_down, w_up, b_up))
    validate(x, task, w_down, b_down, w_up, b_up, residual, scale, activation)
    return autocast(x), task, w_down, b_down or (), w_up, b_up or (), residual, scale, activation


OP.prepare = _prepare


def adapter_bank(
    x: Tensor,
    task: Tensor,
    w_down: PerTask,
    b_down: PerTask | None,
    w_up: PerTask,
    b_up: PerTask | None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """`bottleneck_adapter`, each sample with the parameters of its own task, in one call; differentiable once.

    `y[b] = residual[b] + scale * (act(x[b] w_down[t]^T + b_down[t]) w_up[t]^T + b_up[t])` with t = task[b]: Houlsby et
    al. 2019 (arXiv:1902.00751), whose one backbone serves many tasks, for a batch in which they mix. The samples may
    come in any order, and tasks may have none: their gradients are zero (`nn.AdapterBank` does not pass those tasks, so
    that they get no gradient).

    Args:
        x: input [B, ..., d_in], float32, bfloat16, float16 or float64, any strides. Under autocast it is first cast to
            the autocast dtype.
        task: the task of each sample, int64 [B] on x's device. More generally it has the shape of x's first
            dimensions: [] is one task for all, [B, S] one per token. Values lie in [0, T).
        w_down: T down-projections [r, d_in], a list or one tensor [T, r, d_in]. Parameters share one dtype, which may
            differ from x's (float32 masters beside bfloat16 activations); kernels cast as they read and accumulate in
            float32.
        b_down: their biases [r], or None.
        w_up: T up-projections [d_out, r].
        b_up: their biases [d_out], or None.
        residual: what is added, [B, ..., d_out]: x itself (sequential), another tensor (parallel), or None.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu" (0.01) or "identity".
        scale: a float.
        impl: "reference", "cpp", "triton", or None for the fastest known; see `explain` and `use_impl`.

    Returns:
        [B, ..., d_out], contiguous, in x's dtype, promoted with residual's. Each gradient has its input's dtype.

    Raises:
        ValueError: a shape, device, activation or impl that does not fit; a task outside [0, T). On a GPU nobody waits
            for the values of `task`: "triton" makes NaN of the sample and of its dx, and no weight gradient, and
            "reference" does what PyTorch's indexing does, as it does in a compiled graph.
        TypeError: not a tensor, not floating point, or dtypes that do not mix.
        RuntimeError: `impl` was asked for and cannot run this call; the message says why. Forward-mode AD and double
            backward, which only `impl="reference"` computes.
    """
    sequential = residual is x
    call = _prepare(x, task, w_down, b_down, w_up, b_up, residual=residual, activation=activation, scale=scale)
    chosen = OP.select(impl, *call)
    if chosen == REFERENCE:
        return reference(*call)
    sequential = sequential and call[0] is x  # an autocast copy of x is another tensor than the residual
    x, lists, scale = call[0], call[2:6], float(scale)
    if not torch.is_grad_enabled():
        return FORWARD(chosen, x, task, *lists, residual, scale, activation, False)[0]
    save_z = x.requires_grad or any(map(_trains, lists[:3]))
    other = None if sequential else residual
    sizes = tuple(map(len, lists))
    parameters = [p for each in lists for p in each]
    return _AdapterBank.apply(x, other, task, sizes, scale, activation, sequential, save_z, chosen, *parameters)
