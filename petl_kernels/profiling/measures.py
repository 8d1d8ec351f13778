"""Small measures of a training step: bytes saved for backward, operators launched, time spent in chosen modules."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def saved_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass while `fn()` runs.

    A storage that several operators save counts once and whole; storages of `exclude`, normally
    `model.parameters()`, which exist anyway, do not count.

    Args:
        fn: runs a forward pass (a backward pass in it does not lower the figure).
        exclude: tensors whose storages are not counted.

    Returns:
        The sum over the distinct storages.
    """
    return _saved(fn, exclude, lambda: "").total()


def saved_by_module(fn: Callable[[], Any], model: nn.Module) -> Counter[str]:
    """The bytes of `saved_bytes`, by the module that runs when a storage is first saved.

    Args:
        fn: runs a forward pass of `model`, not compiled.
        model: whose parameters do not count; what is saved outside of it counts under "".

    Returns:
        Module name -> bytes; the innermost module counts, and the model itself is called "(model)".
    """
    names = {module: name or "(model)" for name, module in model.named_modules()}
    running = [""]

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names.get(module, running[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    # Hooks for all modules: with hooks of their own, fused modules would take the path of their library.
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        return _saved(fn, model.parameters(), lambda: running[-1])
    finally:
        for handle in handles:
            handle.remove()


def _saved(fn: Callable[[], Any], exclude: Iterable[Tensor], place: Callable[[], str]) -> Counter[str]:
    known = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, or an address could be used twice
    found: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known and storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage
                found[place()] += storage.nbytes()
        return tensor.detach()  # an output that its own node saved as it is would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return found


# They allocate, read metadata or rename, and launch nothing.
_NOT_LAUNCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NOT_LAUNCHED |= {"_local_scalar_dense", "promote_types"}
_VIEWS = {"detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh"}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _NOT_LAUNCHED or name in _VIEWS or func.namespace == "profiler"):
            self.counts[f"{func.namespace}::{name}"] += 1
        return func(*args, **(kwargs or {}))


def count_launches(fn: Callable[[], Any]) -> Counter[str]:
    """How often `fn()`, its backward pass included, calls each operator that computes something.

    Counted below autograd, where an operator is what a GPU launches kernels for; views and allocations are left out.
    A proxy: an operator may launch several kernels. Operators of this package count as one each, whatever their
    implementation; "reference" consists of PyTorch's own, counted one by one.

    Returns:
        Operator name ("aten::addmm") -> calls; `.total()` is the sum.
    """
    with _Counting() as mode:
        fn()
    return mode.counts


@dataclass
class ModuleTime:
    """Seconds of one or more calls: `total`, and of it in the chosen modules' `forward` and `backward`."""

    total: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def share(self) -> float:
        """The part of the total, 0 to 1, spent in the chosen modules."""
        return (self.forward + self.backward) / self.total if self.total else 0.0


def module_time(modules: Iterable[nn.Module], fn: Callable[[], Any], method: str = "forward") -> ModuleTime:
    """Time `fn()` and the part of it spent in `method` of `modules`, in the forward and in the backward pass.

    The backward part of a call runs from the gradient of its output to the last gradient of its tensor arguments, or,
    where none of them needs one, of the module's parameters. Choose modules that do not contain one another. On a GPU
    every mark synchronizes.

    Args:
        modules: the modules to time.
        fn: runs a step.
        method: the method of each module that counts.

    Returns:
        The seconds; `.share` is the quotient.
    """
    times = ModuleTime()
    calls: list[_Call] = []
    with _timed(list(modules), method, times, calls):
        start = _now()
        fn()
        times.total = _now() - start
    times.backward = sum(call.last - call.first for call in calls if call.first)
    return times


@dataclass
class _Call:
    """When the backward pass entered a call (its output's gradient) and was last seen in it."""

    first: float = 0.0
    last: float = 0.0

    def enter(self, grad: Tensor) -> None:
        self.first = self.last = _now()

    def seen(self, grad: Tensor) -> None:
        self.last = _now()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _view(tensor: Tensor, call: _Call) -> Tensor:
    """The same values as a tensor of this call alone, whose gradient is what this call gives."""
    if not tensor.requires_grad:
        return tensor
    view = tensor.view_as(tensor)
    view.register_hook(call.seen)
    return view


@contextmanager
def _timed(modules: list[nn.Module], method: str, times: ModuleTime, calls: list[_Call]) -> Iterator[None]:
    handles: list[Any] = []

    def run(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call()
        calls.append(call)
        arguments = tree_map_only(Tensor, partial(_view, call=call), (args, kwargs))
        start = _now()
        output = original(*arguments[0], **arguments[1])
        times.forward += _now() - start
        if not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(arguments)):
            handles.extend(p.register_hook(call.seen) for p in module.parameters() if p.requires_grad)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(call.enter)
        return output

    try:
        with intercept([(module, method) for module in modules], run):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def intercept(places: Iterable[tuple[nn.Module, str]], run: Callable[..., Any]) -> Iterator[None]:
    """Have `run(module, original, *args, **kwargs)` answer the calls of a method of modules.

    By a class in front of the module's own, or else fused modules would see a replaced forward, and step aside.
    """
    undo: list[Callable[[], None]] = []
    try:
        for module, method in places:
            if method in module.__dict__:  # somebody put one on the instance, in front of every class
                before = module.__dict__[method]
                module.__dict__[method] = partial(run, module, before)
                undo.append(partial(module.__dict__.__setitem__, method, before))
            else:
                own = type(module)
                in_front = type(own.__name__, (own,), {method: _through(own, method, run)})
                object.__setattr__(module, "__class__", in_front)
                undo.append(partial(object.__setattr__, module, "__class__", own))
        yield
    finally:
        for each in reversed(undo):
            each()


def _through(own: type, method: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, getattr(own, method).__get__(self), *args, **kwargs)

    return call
