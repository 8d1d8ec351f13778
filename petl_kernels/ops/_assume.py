"""What a compiler takes as a constant instead of tracing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def assume_constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result` without its import of torch._dynamo and triton, 1.2 s of CPU time."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
