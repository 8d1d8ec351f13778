"""Parameters that `fully_shard` has split over processes, where a layer has to write into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def write_shard(frozen: Any, dim: int, channels: Tensor, trained: Any) -> None:
    """`frozen.index_copy_(dim, channels, trained)` for a DTensor, which has no such operator.

    Collective: the trained channels, k/d of the weight, are gathered; each process writes those that it holds.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    values = trained.full_tensor() if hasattr(trained, "full_tensor") else trained
    local = frozen.to_local()
    _, offsets = compute_local_shape_and_global_offset(frozen.shape, frozen.device_mesh, frozen.placements)
    for axis, (start, size) in enumerate(zip(offsets, local.shape)):
        if axis != dim:
            values = values.narrow(axis, start, size)
    here = ((channels >= offsets[dim]) & (channels < offsets[dim] + local.shape[dim])).nonzero().flatten()
    local.index_copy_(dim, channels[here] - offsets[dim], values.index_select(dim, here).to(local.dtype))
