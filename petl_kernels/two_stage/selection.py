"""From scores to the channels that are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from petl_kernels.ops._validate import check_channels


class Selection(Mapping[str, Tensor]):
    """Chosen channels by module name: `selection[name]` is int64 [k], on the CPU. Immutable; prints as a summary.

    Args:
        channels: module name -> distinct int64 indices [k].
        widths: module name -> number of channels to choose from.

    Raises:
        TypeError, ValueError: indices that repeat or lie outside of their width; names that differ.
    """

    def __init__(self, channels: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
        if channels.keys() != widths.keys():
            raise ValueError("Selection: channels and widths must name the same modules")
        for name, indices in channels.items():
            if isinstance(indices, Tensor):
                check_channels(f"Selection {name!r}", indices, widths[name], indices)
            else:
                raise TypeError(f"Selection {name!r}: channels must be int64 [k], got {type(indices).__name__}")
        self._channels = {name: indices.detach().to("cpu", copy=True) for name, indices in channels.items()}
        self._widths = {name: int(widths[name]) for name in self._channels}

    @property
    def widths(self) -> dict[str, int]:
        """Module name -> number of channels there were to choose from."""
        return dict(self._widths)

    def __getitem__(self, name: str) -> Tensor:
        return self._channels[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        same = self._widths == other._widths
        return same and all(torch.equal(c, other._channels[name]) for name, c in self._channels.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        chosen = sum(map(len, self._channels.values()))
        lines = [f"Selection: {chosen} of {sum(self._widths.values())} channels in {len(self)} modules"]
        lines += [f"  {name}: {len(c)} of {self._widths[name]}" for name, c in self._channels.items()]
        return "\n".join(lines)


def select(scores: Mapping[str, Tensor], k: int | float, per_layer: bool = True) -> Selection:
    """The channels with the highest scores: exactly as many as asked for, ties going to the lower channel.

    Args:
        scores: module name -> one score per channel, [d].
        k: how many: an int, or a float as a fraction, rounded to the nearest integer (half to even).
        per_layer: `k` (or the fraction of its width) in every layer; else over all layers together, where the scores
            of each layer are first divided by their L2 norm (Molchanov et al. 2017, arXiv:1611.06440, section 2.2), and
            ties go to the layer that stands first in `scores`. A layer may then be left with no channel at all.

    Returns:
        Ascending indices for every name in `scores`.

    Raises:
        TypeError: `k` is not a number; scores that are not floating-point [d].
        ValueError: scores with NaN, or infinite ones where layers are compared; `k` negative or more than there are.
    """
    if not scores:
        raise ValueError("select: scores are empty")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or score.dim() != 1 or not score.is_floating_point():
            raise TypeError(f"select: scores of {name!r} must be a floating-point tensor [d]")
        if score.isnan().any() or not (per_layer or score.isfinite().all()):
            raise ValueError(
                f"select: scores of {name!r} must be {'numbers' if per_layer else 'finite'}, got NaN or inf"
            )
    on_cpu = {name: score.detach().to("cpu", torch.float64) for name, score in scores.items()}
    widths = {name: len(score) for name, score in on_cpu.items()}
    if per_layer:
        chosen = {name: _top(score, _count(k, len(score), repr(name))) for name, score in on_cpu.items()}
        return Selection(chosen, widths)
    normalised = [score / score.norm().clamp_min(torch.finfo(torch.float64).tiny) for score in on_cpu.values()]
    together = torch.cat(normalised)
    mask = torch.zeros(len(together), dtype=torch.bool)
    mask[_top(together, _count(k, len(together), "all layers together"))] = True
    parts = mask.split(list(widths.values()))
    return Selection({name: part.nonzero().flatten() for name, part in zip(widths, parts)}, widths)


def _count(k: int | float, width: int, what: str) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"select: k must be an int or a fraction, got {type(k).__name__}")
    if not 0 <= k <= (1 if isinstance(k, float) else width):
        limit = "a fraction from 0.0 to 1.0" if isinstance(k, float) else f"from 0 to the {width} channels of {what}"
        raise ValueError(f"select: k must be {limit}, got {k}")
    return round(k * width) if isinstance(k, float) else k


def _top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the highest scores; topk would break ties as it likes."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values
