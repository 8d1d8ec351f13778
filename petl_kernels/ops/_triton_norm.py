"""What the Triton kernels of a norm beside an adapter share: the statistics of rows in slabs, a norm's parameters."""

# mypy: ignore-errors
# In Triton an annotation is no type: it marks a constant of compilation.

from __future__ import annotations

import triton
import triton.language as tl

from petl_kernels.ops.layer_norm.triton_kernels import _parameter as parameter

__all__ = ["add_statistics", "finish_statistics", "parameter"]


@triton.jit
def add_statistics(u, cols, before, shift, mean, square, D: tl.constexpr):
    """The statistics of `before` columns and of the slab u behind them, which D bounds: their mean, less a shift, and
    the sum of squared deviations from it.

    The shift is the mean of the first slab, rounded as it is, so that what is left of rows far from zero is small; and
    a slab's deviations are taken from its own mean (two levels, Chan et al. 1983), so that nothing cancels.
    """
    inside = cols[None, :] < D
    count = tl.minimum(D - before, cols.shape[0]).to(tl.float32)
    shift = tl.where(before == 0, tl.sum(tl.where(inside, u, 0.0), 1) / count, shift)
    near = tl.where(inside, u - shift[:, None], 0.0)
    own = tl.sum(near, 1) / count
    deviation = tl.where(inside, near - own[:, None], 0.0)
    delta = own - mean
    share = count / (before + count)
    return shift, mean + delta * share, square + tl.sum(deviation * deviation, 1) + delta * delta * (before * share)


@triton.jit
def finish_statistics(shift, mean, square, eps, D: tl.constexpr, RMS: tl.constexpr):
    """(shift, mean, rstd) by which rows are normalised, ((v - shift) - mean) rstd, from what add_statistics gathered.

    RMSNorm takes no mean off; its mean square is mean^2 + variance, exact where a sum of squares of rows far from zero
    is not.
    """
    square = square / D
    if RMS:
        # A row of which an element is infinite has no variance, but an infinite mean square.
        whole = shift + mean
        square = whole * whole + tl.where(square >= 0, square, 0.0)
        shift = tl.zeros_like(shift)
        mean = tl.zeros_like(mean)
    return shift, mean, 1.0 / tl.sqrt(square + tl.cast(eps, tl.float32))
