"""How a module of another library is swapped: its class becomes a subclass, made at run time in front of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Fused:
    """What the swapped classes share. isinstance, names and state_dict stay; pickle and deepcopy rebuild the class.

    Attributes:
        fused_from: the module's own class, to which `unfuse` returns it.
        fused_impl: the implementation asked for, or None.
    """

    fused_from: type
    fused_impl: str | None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        in_front = type(self).__bases__[0]  # of `fused_class`
        return (_blank, (in_front, self.fused_from), *super().__reduce_ex__(protocol)[2:])


@cache
def fused_class(in_front: type, original: type) -> type:
    """`in_front`, a subclass of `Fused`, in front of the class `original`."""
    return type(f"Fused{original.__name__}", (in_front, original), {"fused_from": original})


def _blank(in_front: type, original: type) -> Any:
    return object.__new__(fused_class(in_front, original))


def original_class(module: Any) -> type:
    """The module's own class, swapped or not."""
    return getattr(type(module), "fused_from", type(module))


def observed(module: nn.Module) -> bool:
    """Whether somebody hooked into the module or replaced its forward, and expects to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
