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
    known = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage
        return tensor.detach()  # an output that its own node saved as it is would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in storages.values())


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
        if not (func.is_view or name in _NOT_LAUNCHED or name in _VIEWS):
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

    replaced = [(module, module.__dict__.get(method)) for module in modules]
    for module in modules:
        setattr(module, method, partial(run, module, getattr(module, method)))
    try:
        yield
    finally:
        for module, before in replaced:
            delattr(module, method)
            if before is not None:
                setattr(module, method, before)
        for handle in handles:
            handle.remove()
