"""The gradients of `channel_linear` on the CUDA kernels of `petl_kernels._cuda`.

The chosen columns of g are gathered on their way to shared memory: there is no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from petl_kernels.ops._cuda import Workspace, _cuda, cannot_run, launch_on
from petl_kernels.ops._gradients import new_gradients
from petl_kernels.ops._rows import row_major, rows


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
) -> str | None:
    """Why these kernels cannot run a (validated) call, or None when they can."""
    return cannot_run(x, weight, bias, channel_weight)


def backward(
    g: Tensor,
    x: Tensor | None,
    channels: Tensor,
    channel_weight: Tensor,
    channel_bias: Tensor | None,
    dim: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients that `needs` names, the others empty; schema in the op's `__init__`."""
    dw, db = new_gradients((channel_weight, channel_bias), needs, channel_weight)
    if dw.numel() + db.numel() == 0:
        return dw, db
    n = g.numel() // g.shape[-1]
    if n == 0:
        return dw.zero_(), db.zero_()
    picked, dense = (g, x) if dim == 0 else (x, g)
    picked, dense = row_major(picked), row_major(dense) if needs[0] else None
    channels = channels.contiguous()
    _cuda.channel_gradient(
        launch_on(g.device),
        (n, channels.shape[0], channel_weight.shape[1 - dim]),
        rows(picked),
        channels.data_ptr() if dim == 0 else 0,
        rows(dense),
        dim == 1,
        rows(dw) if needs[0] else None,
        rows(db) if needs[1] else None,
        Workspace(g.device),
    )
    return dw, db
