"""`bottleneck_adapter` on the kernels for compute capability 9.0 (wgmma, TMA, clusters): one launch per direction.

An implementation of its own beside "cuda": no GPU has run these kernels yet, and they run only where asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petl_kernels.ops._cuda import Workspace, _cuda, cannot_run, capability, launch_on
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows
from petl_kernels.ops.bottleneck_adapter.reference import CODES

if not hasattr(_cuda, "bottleneck_forward_sm90"):
    raise ImportError("petl_kernels was built without its kernels for sm_90a: PETL_KERNELS_CUDA_ARCHS has no 90a")

_NO_DROPOUT = (0, 0.0)  # the address of a seed, and the probability
_WIDEST = 8 * 128  # a cluster is at most 8 blocks, which have 128 columns each


def unsupported(x: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, *rest: Any) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    if reason := cannot_run(x, w_down):
        return reason
    if capability(x.device.index) != (9, 0):
        return "it needs compute capability 9.0, got {}.{}".format(*capability(x.device.index))
    return unfit(x, w_down, b_down, w_up, *rest)


def unfit(x: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, *rest: Any) -> str | None:
    """Why tensor maps and tiles of 64 x 64 do not fit a call, on whatever device it is."""
    _, residual, _, gate, _, dropout, activation = rest
    for what, asked in (("a gate", gate is not None), ("dropout", dropout), ("a softmax", activation == "softmax")):
        if asked:
            return f"it does not compute {what}; impl='cuda' does"
    dtypes = [t.dtype for t in (x, residual) if t is not None]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(dtype != x.dtype for dtype in dtypes):
        return f"it needs one 16-bit dtype for x and residual, got {', '.join(map(str, dtypes))}"
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    if r > 64 or max(d_in, d_out) > _WIDEST:
        return f"it holds bottlenecks of up to 64 and rows of up to {_WIDEST}, got r = {r}, d = {d_in} and {d_out}"
    if r % 8 or d_in % 8 or d_out % 8:
        return f"it needs multiples of 8 (rows on 16 bytes), got r = {r}, d = {d_in} and {d_out}"
    return None


def _on_16_bytes(t: Tensor | None) -> Tensor | None:
    """`t`, or a copy of it, as rows that begin on 16 bytes; rows are multiples of 16 bytes long."""
    t = row_major(t)
    if t is None or (t.data_ptr() % 16 == 0 and (t.is_contiguous() or t.stride(0) * t.element_size() % 16 == 0)):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def forward(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    alpha: float,
    activation: str,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., d_out] and z [..., r] (empty unless `save_z`); shapes and dtypes as in the op's schema."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    y = x.new_empty((*x.shape[:-1], d_out))
    z = x.new_empty((*x.shape[:-1], r) if save_z else (0,))
    if y.numel() > 0:
        x_rows = _on_16_bytes(x)
        added = x_rows if residual is x else _on_16_bytes(residual)
        # TMA does not convert: weights of another dtype are cast first, a launch each.
        down, up = (_on_16_bytes(w.to(x.dtype)) for w in (w_down, w_up))
        weights = down, row_major(b_down), up, row_major(b_up)
        _cuda.bottleneck_forward_sm90(
            launch_on(x.device),
            (y.numel() // d_out, d_in, r, d_out),
            *map(rows, (x_rows, *weights, added, row_major(scale), None)),
            0 if scale is None else scale.numel(),
            *_NO_DROPOUT,
            float(alpha),
            CODES[activation],
            rows(y),
            rows(z) if save_z else None,
        )
    return y, z


def backward(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    alpha: float,
    activation: str,
    add_g: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of (x, w_down, b_down, w_up, b_up, scale, gate); an empty tensor for each that is not needed."""
    (r, d_in), d_out = w_down.shape, w_up.shape[0]
    dx = z.new_empty((*g.shape[:-1], d_in) if needs[0] else (0,))
    grads = new_gradients((w_down, b_down, w_up, b_up, scale, gate), needs[1:], z)
    if g.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    inputs = [*map(_on_16_bytes, (g, x, z)), *map(row_major, (w_down, w_up, b_up, scale))]
    _cuda.bottleneck_backward_sm90(
        launch_on(g.device),
        (g.numel() // d_out, d_in, r, d_out),
        *map(rows, (*inputs, None)),
        0 if scale is None else scale.numel(),
        *_NO_DROPOUT,
        float(alpha),
        CODES[activation],
        add_g,
        *(rows(t) if need else None for t, need in zip((dx, *grads), needs)),
        Workspace(g.device),
    )
    return dx, *grads
