"""An operator with interchangeable implementations: its two registered directions and the choice between them.

One schema per direction, with a trailing `str impl`, so that a compiled graph records which implementation it
calls; one fake per direction; and N implementations that are plain modules with `forward`, `backward` and
`unsupported`, imported when first looked at.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch

ENV_IMPL = "PETL_KERNELS_IMPL"
REFERENCE = "reference"

_LIB = torch.library.Library("petl_kernels", "DEF")
_forced = threading.local()  # .impl is set by `use_impl`; a ContextVar would break the graph under torch.compile


class Direction:
    """A registered operator (`<op>_fwd` or `<op>_bwd`) in front of the implementations' entry points."""

    def __init__(self, op: Op, schema: str, entry: str, fake: Callable[..., Any]) -> None:
        self._op, self._entry = op, entry
        self._callables: dict[str, Callable[..., Any]] = {}
        name = schema.split("(")[0]
        _LIB.define(schema.replace(") ->", ", str impl) ->", 1))
        _LIB.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"petl_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_LIB)
        self.overload = getattr(torch.ops.petl_kernels, name).default

    def _run(self, *args: Any) -> Any:
        impl = args[-1]
        if impl not in self._callables:
            self._callables[impl] = getattr(self._op.module(impl), self._entry)
        return self._callables[impl](*args[:-1])

    def __call__(self, impl: str, *args: Any) -> Any:
        # Plain eager skips the dispatcher, 7 of the 20 us of such a call. Whoever has to see the operator (a
        # compiler, an exporter, fake tensors, a dispatch mode that counts launches) still does.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return self.overload(*args, impl)
        return self._run(*args, impl)


class Op:
    """One operator: its name, its implementations, and which of them runs a call.

    Args:
        package: the folder that holds the op; `impls` are modules in it.
        impls: names of the implementations besides the reference.
        preference: `(*call) -> names`, what measurement found fastest for such a call, best first. "auto" takes the
            first that supports the call; where none does, the reference.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(self, package: str, impls: Sequence[str], preference: Callable[..., Sequence[str]]) -> None:
        self.name = package.rsplit(".", 1)[1]
        self.impls = (REFERENCE, *impls)
        self.prepare: Callable[..., tuple[Any, ...]]  # the public function's arguments -> the validated call
        self._package, self._preference = package, preference
        Op.registry[self.name] = self

    def direction(self, schema: str, entry: str, fake: Callable[..., Any]) -> Direction:
        """Register one direction under `schema`; `entry` is the function every implementation has for it."""
        return Direction(self, schema, entry, fake)

    def module(self, impl: str) -> ModuleType:
        """The module of an implementation, imported on first use."""
        return importlib.import_module(f"{self._package}.{impl}")

    def unsupported(self, impl: str, *call: Any) -> str | None:
        """Why `impl` cannot run this call, or None when it can."""
        if impl == REFERENCE:
            return None
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return "torch.func transforms (vmap, grad, jvp) cannot look inside it; the reference supports them"
        try:
            module = self.module(impl)
        except ImportError as error:
            return f"it cannot be imported here: {error}"
        return module.unsupported(*call)

    def requested(self, impl: str | None) -> str | None:
        """The implementation asked for (context manager > argument > environment), or None for "auto"."""
        wanted = getattr(_forced, "impl", None) or impl or os.environ.get(ENV_IMPL) or "auto"
        if wanted != "auto" and wanted not in self.impls:
            raise ValueError(f"{self.name}: impl must be one of {('auto', *self.impls)}, got {wanted!r}")
        return None if wanted == "auto" else wanted

    def select(self, impl: str | None, *call: Any) -> str:
        """The implementation that runs this call; an explicit one that cannot raises a RuntimeError."""
        wanted = self.requested(impl)
        if wanted is None:
            for name in self._preference(*call):
                if self.unsupported(name, *call) is None:
                    return name
            return REFERENCE
        reason = self.unsupported(wanted, *call)
        if reason is not None:
            raise RuntimeError(f"{self.name}: impl={wanted!r} cannot run this call: {reason}")
        return wanted


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run every op inside the block with implementation `impl` ("auto", "reference", "cpp", "triton").

    It outranks the argument `impl=` and the environment variable `PETL_KERNELS_IMPL`; the innermost block wins. It
    holds for the current thread.
    """
    before = getattr(_forced, "impl", None)
    _forced.impl = impl
    try:
        yield
    finally:
        _forced.impl = before


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call (`chosen`), and per other implementation why it does not (`others`)."""

    op: str
    chosen: str
    others: dict[str, str]

    def __str__(self) -> str:
        rest = "".join(f"\n  not {name}: {reason}" for name, reason in self.others.items())
        return f"{self.op} runs on {self.chosen!r}{rest}"


def explain(fn: Callable[..., Any], *args: Any, impl: str | None = None, **kwargs: Any) -> Explanation:
    """Say which implementation `fn(*args, **kwargs)` would run, and why each other would not; nothing is computed.

    Args:
        fn: a public op, such as `petl_kernels.bottleneck_adapter`.
        args, kwargs, impl: exactly as for the call itself.

    Raises:
        TypeError: `fn` is not an op of this package.
        ValueError, TypeError, RuntimeError: whatever the call itself would raise before computing.
    """
    op = Op.registry.get(getattr(fn, "__name__", ""))
    if op is None:
        raise TypeError(f"explain: fn must be one of the ops {sorted(Op.registry)}, got {fn!r}")
    call = op.prepare(*args, **kwargs)
    chosen = op.select(impl, *call)
    asked = f"{chosen!r} was asked for" if op.requested(impl) else "not known by measurement to be faster here"
    others = {name: op.unsupported(name, *call) or asked for name in op.impls if name != chosen}
    return Explanation(op.name, chosen, others)
