"""The activations of `bottleneck_adapter` and their derivatives, on tiles in float32."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    # exp of a negative number cannot overflow; below 1/4, where 1 - e cancels, the series (its next term is < 1e-8).
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    z2 = z * z
    series = z * (1.0 + z2 * (-1.0 / 3 + z2 * (2.0 / 15 + z2 * (-17.0 / 315 + z2 * (62.0 / 2835)))))
    return tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -t, t))


@triton.jit
def _gelu_tanh_inner(z):
    return 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in float32. Comparisons are written so that a NaN passes through. Of a softmax z is the value already."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + _tanh(_gelu_tanh_inner(z)))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        return _tanh(z)
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, 0.01 * z)
    else:
        tl.static_assert(ACTIVATION == "identity" or ACTIVATION == "softmax")
        return z


@triton.jit
def activate_grad(dh, z, ACTIVATION: tl.constexpr):
    """dh * act'(z) in float32."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, dh)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
        return dh * (0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(_gelu_tanh_inner(z))
        inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * z * z)
        return dh * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return dh * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        return dh * (1.0 - t * t)
    elif ACTIVATION == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-z))
        return dh * s * (1.0 - s)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, dh, 0.01 * dh)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return dh


@triton.jit
def softmax(z, ranks, R: tl.constexpr):
    """The softmax of each row of a tile that holds all R of its elements, at `ranks`."""
    z = tl.where(ranks[None, :] < R, z, float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def softmax_grad(dh, h, ranks, R: tl.constexpr):
    """dh through the softmax h: h (dh - h . dh)."""
    mean = tl.sum(tl.where(ranks[None, :] < R, h * dh, 0.0), 1)
    return h * (dh - mean[:, None])
