"""What was asked for: context manager > argument > environment > "auto"."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AUTO = "auto"
ENV_IMPL = "PETL_KERNELS_IMPL"

_forced = threading.local()  # .impl is set by `use_impl`; a ContextVar would break the graph under torch.compile


def asked_for(impl: str | None) -> str:
    """The name asked for, given the argument `impl=` of a call; it may be anything."""
    return getattr(_forced, "impl", None) or impl or os.environ.get(ENV_IMPL) or AUTO


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run every op inside the block with implementation `impl` ("auto", "reference", "cpp", "triton", "cuda";
    of `bottleneck_adapter` also "cuda_sm90").

    It outranks the argument `impl=` and the environment variable `PETL_KERNELS_IMPL`; the innermost block wins. It
    holds for the current thread.
    """
    before = getattr(_forced, "impl", None)
    _forced.impl = impl
    try:
        yield
    finally:
        _forced.impl = before
