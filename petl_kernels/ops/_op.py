"""An operator with interchangeable implementations: its two registered directions and the choice between them.

One schema per direction, with a trailing `str impl`, so that a compiled graph records which implementation it
calls; one fake per direction; and N implementations that are plain modules with `forward`, `backward` and
`unsupported`, imported when first looked at.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import index
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from petl_kernels.ops import _measured
from petl_kernels.ops._assume import assume_constant
from petl_kernels.ops._select import AUTO, asked_for

REFERENCE = "reference"

_LIB = torch.library.Library("petl_kernels", "DEF")


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


@assume_constant
def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _flat(call: Sequence[Any]) -> Iterator[Any]:
    """The arguments of a call, those in its lists one by one."""
    for value in call:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, float, int, str, type(None)))


def _wrapper(call: Sequence[Any]) -> str | None:
    """The type of an argument that only wraps tensors (DTensor, a quantised weight), whose address says nothing."""
    if torch.compiler.is_compiling() or _PLAIN.issuperset(map(type, call)):
        return None
    return next((type(value).__name__ for value in _flat(call) if is_traceable_wrapper_subclass(value)), None)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def opaque(call: Sequence[Any]) -> bool:
    """Whether a function of autograd of our own could not run this call: a transform, tangents, wrapper tensors."""
    return (
        _in_transform()
        or _wrapper(call) is not None
        or (forward_ad._current_level >= 0 and any(map(_has_tangent, call)))
    )


_import_failures: dict[str, str | None] = {}


@assume_constant
def _import_failure(name: str) -> str | None:
    """Import a module once; None, or why it cannot be imported. Not traceable, hence a constant to a compiler."""
    if name not in _import_failures:
        try:
            importlib.import_module(name)
            _import_failures[name] = None
        except ImportError as error:
            _import_failures[name] = f"it cannot be imported here: {error}"
    return _import_failures[name]


class Op:
    """One operator: its name, its implementations, and which of them runs a call.

    Args:
        package: the folder that holds the op; `impls` are modules in it.
        impls: names of the implementations besides the reference.
        preference: `(*call) -> names`, what measurement found fastest for such a call, best first. "auto" takes the
            first that supports the call; where none does, the reference.
        sizes: `(*call) -> (rows, widths...)` of a call whose first argument is a tensor. An op that has them is asked
            for its preference on the CPU only; what it takes on a GPU is in the table of `_measured`.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(
        self,
        package: str,
        impls: Sequence[str],
        preference: Callable[..., Sequence[str]],
        sizes: Callable[..., tuple[int, ...]] | None = None,
    ) -> None:
        self.name = package.rsplit(".", 1)[1]
        self.impls = (REFERENCE, *impls)
        self.prepare: Callable[..., tuple[Any, ...]]  # the public function's arguments -> the validated call
        self.directions: dict[str, Direction] = {}
        self.sizes = sizes
        self._package, self._preference = sys.modules[package], preference
        Op.registry[self.name] = self

    def direction(self, schema: str, entry: str, fake: Callable[..., Any]) -> Direction:
        """Register one direction under `schema`; `entry` is the function every implementation has for it."""
        self.directions[entry] = Direction(self, schema, entry, fake)
        return self.directions[entry]

    def module(self, impl: str) -> ModuleType:
        """The module of an implementation, imported on first use."""
        return importlib.import_module(f"{self._package.__name__}.{impl}")

    def unsupported(self, impl: str, *call: Any) -> str | None:
        """Why `impl` cannot run this call, or None when it can."""
        if impl == REFERENCE:
            return None
        if _in_transform():
            return "torch.func transforms (vmap, grad, jvp) cannot look inside it; the reference supports them"
        if wrapped := _wrapper(call):
            return f"its tensors must own their memory, got a {wrapped}"
        if forward_ad._current_level >= 0 and any(map(_has_tangent, _flat(call))):
            return "forward-mode AD (jvp) would silently lose the tangents; the reference supports it"
        failure = _import_failure(f"{self._package.__name__}.{impl}")
        # A compiler can read the submodule as an attribute of its package, not through importlib.
        return failure or getattr(self._package, impl).unsupported(*call)

    def requested(self, impl: str | None) -> str | None:
        """The implementation asked for (context manager > argument > environment), or None for "auto"."""
        wanted = asked_for(impl)
        if wanted not in (AUTO, *self.impls):
            raise ValueError(f"{self.name}: impl must be one of {(AUTO, *self.impls)}, got {wanted!r}")
        return None if wanted == AUTO else wanted

    def preferred(self, *call: Any) -> Sequence[str]:
        """The implementations that were measured to be faster than the reference for such a call, best first."""
        if self.sizes is None:
            return self._preference(*call)
        x = call[0]
        if x.device.type == _measured.GPU:
            sizes = self.sizes(*call)
            if torch.compiler.is_compiling():  # a width may be a symbol, of which `index` makes a number
                return _measured.compiled_names(self.name, x.device.index, x.dtype, *map(index, sizes[1:])).split()
            return _measured.eager(self.name, x.device.index, x.dtype, sizes).impls
        return self._preference(*call) if x.device.type == "cpu" else ()

    def reason(self, chosen: str, *call: Any) -> str:
        """Why "auto" takes `chosen` for a call."""
        fastest = "nothing is known to be faster here" if chosen == REFERENCE else "known to be the fastest here"
        x = call[0]
        if self.sizes is None or x.device.type != _measured.GPU:
            return fastest
        return f"{fastest} ({_measured.eager(self.name, x.device.index, x.dtype, self.sizes(*call)).source})"

    def select(self, impl: str | None, *call: Any) -> str:
        """The implementation that runs this call; an explicit one that cannot raises a RuntimeError."""
        wanted = self.requested(impl)
        if wanted is None:
            return next((n for n in self.preferred(*call) if self.unsupported(n, *call) is None), REFERENCE)
        reason = self.unsupported(wanted, *call)
        if reason is not None:
            raise RuntimeError(f"{self.name}: impl={wanted!r} cannot run this call: {reason}")
        return wanted
