"""What the tests of the optimizers share: entries of every kind beside plain parameters that hold the same slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from table import DTYPES, demanded, device, marks
from torch import Tensor
from torch.nn import Parameter

from petl_kernels.ops import channel_adamw, channel_sgd
from petl_kernels.optim import ChannelAdamW, Channels, ChannelSGD
from petl_kernels.testing import Outcome, judge

OPS = {"adamw": channel_adamw, "sgd": channel_sgd}
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adamw": (ChannelAdamW, torch.optim.AdamW),
    "sgd": (ChannelSGD, torch.optim.SGD),
}
# lr is so large that an update is far above the rounding of what is updated, in any dtype.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", dict(lr=0.3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-2)),
    "adamw-maximize": ("adamw", dict(lr=0.3, weight_decay=0.0, eps=1e-3, maximize=True)),
    "adamw-betas": ("adamw", dict(lr=0.3, betas=(0.3, 0.8), weight_decay=0.5, eps=1e-2)),
    "adamw-no-betas": ("adamw", dict(lr=0.3, betas=(0.0, 0.0), eps=1e-2)),
    "sgd": ("sgd", dict(lr=0.3)),
    "sgd-decay": ("sgd", dict(lr=0.3, weight_decay=0.5, maximize=True)),
    "sgd-momentum": ("sgd", dict(lr=0.3, momentum=0.9)),
    "sgd-dampening": ("sgd", dict(lr=0.3, momentum=0.9, dampening=0.5, weight_decay=0.1)),
    "sgd-nesterov": ("sgd", dict(lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1)),
}
# (shape, channels, dim); channels None is the whole tensor.
ENTRIES: dict[str, tuple[tuple[int, ...], list[int] | None, int]] = {
    "rows": ((9, 37), [7, 0, 8, 3], 0),
    "rows-none": ((9, 37), [], 0),
    "rows-one": ((9, 37), [4], 0),
    "rows-all": ((9, 37), list(reversed(range(9))), 0),
    "rows-narrow": ((40, 3), [39, 2, 11], 0),
    "columns": ((37, 9), [7, 0, 8, 3], 1),
    "columns-none": ((37, 9), [], 1),
    "columns-one": ((37, 9), [8], 1),
    "columns-all": ((37, 9), list(reversed(range(9))), 1),
    "columns-wide": ((30, 300), list(range(299, 0, -2)), 1),
    "vector": ((300,), [299, 1, 0, 30], 0),
    "vector-none": ((300,), [], 0),
    "whole": ((37, 9), None, 0),
    "whole-large": ((20, 1000), None, 0),
    "whole-4d": ((3, 4, 5, 6), None, 0),
    "whole-scalar": ((), None, 0),
    "empty": ((0, 5), None, 0),
    "empty-rows": ((4, 0), [3, 1], 0),
}


def impl_dtype(fp64: bool = True) -> list[Any]:
    """Parameters (impl, dtype): those of the table of demands."""
    return [
        pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}", marks=marks(impl))
        for impl, dtypes in DTYPES.items()
        if demanded(impl)
        for dtype in dtypes
        if fp64 or dtype != torch.float64
    ]


EVERY_IMPL = pytest.mark.parametrize(
    "impl", [pytest.param(p.values[0], marks=p.marks) for p in impl_dtype() if p.values[1] == torch.float32]
)


def gathered(t: Tensor, channels: Tensor | None, dim: int) -> Tensor:
    return t.detach().clone() if channels is None else t.detach().index_select(dim, channels)


@dataclass
class Entry:
    """A full tensor, what is chosen of it, and plain parameters that hold that alone, in its dtype and in float64."""

    param: Parameter
    channels: Tensor | None
    dim: int

    def __post_init__(self) -> None:
        self.start = self.param.detach().clone()
        self.eager = Parameter(gathered(self.param, self.channels, self.dim))
        self.exact = Parameter(self.eager.detach().to(torch.float64, copy=True))

    @property
    def item(self) -> Any:
        return self.param if self.channels is None else Channels(self.param, self.channels, self.dim)

    def set_grad(self, generator: torch.Generator, scale: float = 1.0) -> None:
        """The same gradient for all three, and NaN for what was not chosen."""
        shape, dtype = self.eager.shape, self.param.dtype
        grad = (torch.randn(shape, generator=generator) * scale).to(self.param.device, dtype)
        self.eager.grad, self.exact.grad = grad.clone(), grad.double()
        if self.channels is None:
            self.param.grad = torch.empty_like(self.param).copy_(grad)
        else:
            full = torch.full_like(self.param, torch.nan)
            self.param.grad = full.index_copy_(self.dim, self.channels, grad)

    def others_are_untouched(self) -> bool:
        """Whether every element that was not chosen is bit-identical to the one at the start."""
        if self.channels is None:
            return True
        rest = torch.ones(self.param.shape[self.dim], dtype=torch.bool, device=self.param.device)
        rest[self.channels] = False
        rest = rest.nonzero().flatten()
        return torch.equal(*(t.detach().index_select(self.dim, rest) for t in (self.param, self.start)))


def entry(
    shape: tuple[int, ...],
    channels: list[int] | None,
    dim: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    on: str = "cpu",
    generator: torch.Generator | None = None,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> Entry:
    generator = generator or torch.Generator().manual_seed(len(shape) + sum(shape))
    param = Parameter(layout(torch.randn(shape, generator=generator).to(on, dtype)))
    return Entry(param, None if channels is None else torch.tensor(channels, dtype=torch.int64, device=on), dim)


def entries(impl: str, dtype: torch.dtype = torch.float32) -> dict[str, Entry]:
    return {n: entry(*e, dtype=dtype, on=device(impl)) for n, e in ENTRIES.items()}


class Trio:
    """Our optimizer over entries, torch's over the gathered slices, and torch's in float64."""

    def __init__(self, entries: list[Entry], kind: str, options: Mapping[str, Any], impl: str | None) -> None:
        ours, torchs = OPTIMIZERS[kind]
        self.entries = entries
        self.ours = ours([e.item for e in entries], **options, impl=impl)
        self.eager = torchs([e.eager for e in entries], **options, foreach=True)
        self.exact = torchs([e.exact for e in entries], **options, foreach=False)
        self.generator = torch.Generator().manual_seed(3)

    def step(self, count: int = 1, scale: float = 1.0) -> None:
        for _ in range(count):
            for e in self.entries:
                e.set_grad(self.generator, scale)
            for optimizer in (self.ours, self.eager, self.exact):
                optimizer.step()

    def outcomes(self, *entries: Entry) -> tuple[Outcome, Outcome, Outcome]:
        """Ours, eager and exact: what was updated and its state, of several entries one after the other."""
        found = []
        for which, optimizer in (("param", self.ours), ("eager", self.eager), ("exact", self.exact)):
            parts: dict[str, list[Tensor]] = {}
            for e in entries:
                p = getattr(e, which)
                value = gathered(p, e.channels, e.dim) if which == "param" else p.detach()
                state = {k: v for k, v in sorted(optimizer.state[p].items()) if k != "step" and v is not None}
                for name, t in {"output": value, **state}.items():
                    parts.setdefault(name, []).append(t.flatten())
            joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
            found.append(Outcome(joined.pop("output"), joined))
        return found[0], found[1], found[2]

    def failures(self, change: Callable[..., Any] = lambda *outcomes: outcomes) -> list[str]:
        """What breaks the rule. A few elements are no sample of eager's error: small entries are judged together."""
        large = [e for e in self.entries if e.eager.numel() >= 32]
        groups = [[e] for e in large] + [[*large[:1], *(e for e in self.entries if e.eager.numel() < 32)]]
        return [f"{[list(e.param.shape) for e in g]}: {f}" for g in groups for f in judge(*change(*self.outcomes(*g)))]
