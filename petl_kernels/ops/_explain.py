"""`explain`: which implementation runs a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from petl_kernels.ops._op import Op


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call (`chosen`), `why`, and per other implementation why it does not (`others`)."""

    op: str
    chosen: str
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        rest = "".join(f"\n  not {name}: {reason}" for name, reason in self.others.items())
        return f"{self.op} runs on {self.chosen!r}: {self.why}{rest}"


def explain(fn: Callable[..., Any], *args: Any, impl: str | None = None, **kwargs: Any) -> Explanation:
    """Say which implementation `fn(*args, **kwargs)` would run, and why each other would not; nothing is computed.

    Args:
        fn: a public op, such as `petl_kernels.bottleneck_adapter`.
        args, kwargs, impl: exactly as for the call itself.

    Raises:
        TypeError: `fn` is not an op of this package.
        ValueError, TypeError, RuntimeError: whatever the call itself would raise before computing.
    """
    op = Op.registry.get(getattr(fn, "__name__", "").removesuffix("_"))  # of a function that works in place
    if op is None:
        raise TypeError(f"explain: fn must be one of the ops {sorted(Op.registry)}, got {fn!r}")
    call = op.prepare(*args, **kwargs)
    chosen = op.select(impl, *call)
    if op.requested(impl):
        why, unchosen = "it was asked for", f"{chosen!r} was asked for"
    else:
        why, unchosen = op.reason(chosen, *call), "not known by measurement to be faster here"
    others = {name: op.unsupported(name, *call) or unchosen for name in op.impls if name != chosen}
    return Explanation(op.name, chosen, why, others)
