"""How a method's module enters a model: behind a module of it, beside a stretch, around a norm, instead of a module.
`attention.py` has the places inside an attention.

A module that is added becomes a child of the one at which it acts, under the name `petl`, and is called from a hook.
The model's own parameters keep their names. Deepcopy, pickle and activation checkpointing work, because a hook reads
what it needs from the module that it is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

NAME = "petl"
_INPUT = "petl_input"


@dataclass(frozen=True)
class Insertion:
    """A module that goes into a model at one place, and out again."""

    at: str
    module: nn.Module

    def insert(self, model: nn.Module) -> Callable[[], None]:
        """Put it in; the function that is returned takes it out."""
        raise NotImplementedError


class After(Insertion):
    """`module(output)` in the place of the output of the module `at`."""

    def insert(self, model: nn.Module) -> Callable[[], None]:
        return _hook(model, self, _after)


class Around(Insertion):
    """`norm(input + branch)` with `module(output, input)` as that sum, in the place of the output of the norm `at`."""

    def insert(self, model: nn.Module) -> Callable[[], None]:
        return _hook(model, self, _around)


@dataclass(frozen=True)
class Beside(Insertion):
    """`module(x, output)` in the place of the output of `at`, where x is the first argument of the module `start`."""

    start: str

    def insert(self, model: nn.Module) -> Callable[[], None]:
        site, start = occupy(model, self.at, self.module), model.get_submodule(self.start)
        unlink = link(start, site)
        # Inputs first: where start and site are one module, its hooks run in this order.
        handles = (start.register_forward_pre_hook(_remember, with_kwargs=True), site.register_forward_hook(_beside))

        def remove() -> None:
            leave(site, *handles)
            unlink()

        return remove


class Instead(Insertion):
    """`module` in the place of `at`, a linear or an attention, of which it keeps the Parameters under their names."""

    def insert(self, model: nn.Module) -> Callable[[], None]:
        replaced = model.get_submodule(self.at)
        model.set_submodule(self.at, self.module.train(replaced.training))

        def remove() -> None:
            if model.get_submodule(self.at) is not self.module:
                raise RuntimeError(f"detach: {self.at!r} is no longer the module that attach put there")
            model.set_submodule(self.at, replaced.train(self.module.training))

        return remove


class _Carrier(nn.Module):
    """Carries a tensor from where it comes up to where it is needed; empty between forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "value": None}  # a forward that failed on its way has left one

    def take(self) -> Tensor:
        value, self.value = self.value, None
        return value


def link(*holders: nn.Module) -> Callable[[], None]:
    """Give modules a carrier in common, `petl_input`; the function that is returned takes it away."""
    carrier = _Carrier()
    for holder in holders:
        holder.add_module(_INPUT, carrier)

    def unlink() -> None:
        for holder in {*holders}:
            del holder._modules[_INPUT]

    return unlink


def occupy(model: nn.Module, name: str, module: nn.Module) -> Any:
    """The module of that name, with `module` as its child `petl`."""
    site = model.get_submodule(name)
    if NAME in site._modules:
        raise ValueError(f"attach: {name!r} has a {type(site._modules[NAME]).__name__} already; detach first")
    site.add_module(NAME, module.train(site.training))
    return site


def _hook(model: nn.Module, insertion: Insertion, hook: Callable[..., Any]) -> Callable[[], None]:
    site = occupy(model, insertion.at, insertion.module)
    handle = site.register_forward_hook(hook)
    return lambda: leave(site, handle)


def leave(site: nn.Module, *handles: Any) -> None:
    """Take hooks and the child `petl` away."""
    for handle in handles:
        handle.remove()
    site._modules.pop(NAME, None)


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument, whether it has come by its name or not."""
    return args[0] if args else next(iter(kwargs.values()))


def of_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Attention modules return tuples, of which the first is the sub-layer's output."""
    if isinstance(output, (tuple, list)):
        return type(output)([change(output[0]), *output[1:]])
    return change(output)


def _after(site: Any, args: Any, output: Any) -> Any:
    return of_first(output, site.petl)


def _remember(start: Any, args: Any, kwargs: Any) -> None:
    start.petl_input.value = first(args, kwargs)


def _beside(site: Any, args: Any, output: Any) -> Any:
    x = site.petl_input.take()
    return of_first(output, lambda branch: site.petl(x, branch))


def _around(site: Any, args: Any, output: Tensor) -> Tensor:
    return site.forward(site.petl(output, args[0]))  # its forward, which calls no hook again
