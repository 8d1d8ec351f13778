"""What the channel optimizers share: entries of chosen channels, compact state, one kernel call per device and step."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from petl_kernels.ops._channel_step import NUMBERS, Table, check_param, check_selection, compact_shape
from petl_kernels.ops._op import REFERENCE, Op
from petl_kernels.ops._select import asked_for


@dataclass(frozen=True, eq=False)
class Channels:
    """Rows (`dim=0`) or columns (`dim=1`) of a parameter, as an entry of an optimizer's `params`.

    Attributes:
        tensor: the full parameter [d_out, d_in], or a vector [d], with a gradient of its shape.
        channels: distinct int64 indices [k] in any order, on the tensor's device. The optimizer keeps a copy.
        dim: what they index; 0 for a vector.
    """

    tensor: Tensor
    channels: Tensor
    dim: int = 0


@dataclass
class _Prepared:
    """What stays the same from step to step as long as tensors of the same kinds come along."""

    asked: str
    kinds: list[Any]
    tensors: list[Tensor]
    impl: str
    table: Table


@dataclass
class _Batch:
    """The tensors of a step that have gradients, with what belongs to each, and its hyper-parameters in a row."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    new: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)  # of these states, those of a first step
    numbers: array[float] = field(default_factory=lambda: array("d"))

    def on(self, device: torch.device) -> _Batch:
        """Those on one device."""
        mine = [i for i, p in enumerate(self.params) if p.device == device]
        if len(mine) == len(self.params):
            return self
        numbers = array("d", [n for i in mine for n in self.numbers[i * NUMBERS : (i + 1) * NUMBERS]])
        lists: list[Any] = [[of[i] for i in mine] for of in (self.params, self.grads, self.records, self.states)]
        new = {p: state for p, state in self.new.items() if p.device == device}
        return _Batch(lists[0], lists[1], lists[2], lists[3], new, numbers)


_KIND = attrgetter("shape", "dtype", "device")
_STATELESS = dict.fromkeys(("step", "momentum_buffer"), torch.empty(0))


class ChannelOptimizer(Optimizer):
    """What both optimizers share: entries, compact state, and one call of a kernel per device and step."""

    _op: ClassVar[Op]
    _states: ClassVar[tuple[str, ...]]  # besides "step", in the order of the op
    _numbers: ClassVar[tuple[str, ...]]  # hyper-parameters of the op, in its order
    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], impl: str | None) -> None:
        self._impl = impl
        self._prepared: dict[torch.device, _Prepared] = {}
        self._op.requested(impl)  # an unknown name is an error now, not at the first step
        if isinstance(params, Channels):
            raise TypeError(f"{type(self).__name__}: params must be an iterable, got a Channels; put it into a list")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of tensors and `Channels`, as `torch.optim.Optimizer.add_param_group`."""
        name = type(self).__name__
        if not isinstance(param_group, dict):
            raise TypeError(f"{name}: param_group must be a dict, got {type(param_group).__name__}")
        if "channels" in param_group:
            raise ValueError(f"{name}: a group has no key 'channels'; put Channels(tensor, channels) into 'params'")
        group, given = dict(param_group), param_group["params"]
        if not isinstance(given, (set, frozenset)):  # which torch refuses, since they have no order
            given = [given] if isinstance(given, (Tensor, Channels)) else list(given)
            named = [entry if isinstance(entry, tuple) else (None, entry) for entry in given]
            group["channels"] = [_record(name, entry) for _, entry in named]
            tensors = [entry.tensor if isinstance(entry, Channels) else entry for _, entry in named]
            if len(set(map(id, tensors))) < len(tensors):
                raise ValueError(f"{name}: params must be distinct tensors; some parameters appear more than once")
            group["params"] = [t if label is None else (label, t) for (label, _), t in zip(named, tensors)]
        self._check_group({**self.defaults, **group})
        super().add_param_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Hyper-parameters in their ranges, as torch has them."""
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{name}: lr must be a float or a tensor of one element, got {list(lr.shape)}")
        for key in ("lr", "eps", "weight_decay", "momentum"):
            if key in group and not group[key] >= 0.0:  # nor NaN
                raise ValueError(f"{name}: {key} must be at least 0, got {group[key]}")

    def _has_state(self, group: dict[str, Any]) -> bool:
        return True

    def _options(self, group: dict[str, Any]) -> list[float]:
        """The hyper-parameters of a group in the order of the op."""
        return [float(group[name]) for name in self._numbers]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every entry whose tensor has a gradient.

        Args:
            closure: computes the loss again, and returns it.

        Raises:
            RuntimeError: an implementation was asked for and cannot run this step; the message says why.
            TypeError: a gradient that is sparse or of another dtype than its tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batch = self._gather()
        if batch.params and not self._again(batch):
            for device in dict.fromkeys(p.device for p in batch.params):
                part, before = batch.on(device), self.state
                if part.new:
                    self.state = defaultdict(dict, {**before, **part.new})
                try:  # all that takes memory comes before the kernel, which does its step or leaves everything alone
                    self._update(device, part)
                except BaseException:
                    if part.new:
                        self.state = before
                    raise
        return loss

    def _gather(self) -> _Batch:
        """Every entry whose tensor has a gradient, in order."""
        batch = _Batch()
        params, grads, records, states = batch.params, batch.grads, batch.records, batch.states
        for group in self.param_groups:
            before, has_state = len(params), self._has_state(group)
            for p, record in zip(group["params"], group["channels"]):
                if (grad := p.grad) is not None:
                    params.append(p)
                    grads.append(grad)
                    records.append(record)
                    state = self.state.get(p) if has_state else _STATELESS
                    if not state:
                        state = batch.new[p] = self._new_state(p, record)
                    states.append(state)
            if before < len(params):
                batch.numbers.extend(self._options(group) * (len(params) - before))
        return batch

    def _new_state(self, p: Tensor, record: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros for what an entry updates."""
        state: dict[str, Tensor] = {}
        for name in self._states:
            if record["channels"] is None:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            else:
                state[name] = p.new_zeros(compact_shape(p, record["channels"], record["dim"]))
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state

    def _again(self, batch: _Batch) -> bool:
        """Make the call of the last step again with new addresses, if all tensors are on one device and as then."""
        prepared, watched = self._prepared.get(batch.params[0].device), torch._C._len_torch_dispatch_stack() > 0
        if prepared is None or prepared.asked != asked_for(self._impl) or watched:
            return False
        lists, steps = self._lists(batch)
        if not all(map(is_, prepared.tensors, _together(batch.params, lists, steps))):
            return False
        if prepared.kinds != _kinds(batch.params, batch.grads):
            return False
        prepared.table.point_to(batch.params, batch.grads, lists, steps)
        self._launch(prepared, batch)
        return True

    def _update(self, device: torch.device, batch: _Batch) -> None:
        """One call for the tensors of a device, all of it checked, and kept for the next step."""
        (lists, steps), params, grads = self._lists(batch), batch.params, batch.grads
        channels, dims = ([record[key] for record in batch.records] for key in ("channels", "dim"))
        options: dict[str, list[Any]] = {n: batch.numbers[i::NUMBERS].tolist() for i, n in enumerate(self._numbers)}
        options |= {name: list(map(bool, options[name])) for name in ("maximize", "nesterov") if name in options}
        scale, inf = self._scaling(device)
        call = self._op.prepare(
            params, grads, *lists, steps, channels, dims, **options, grad_scale=scale, found_inf=inf
        )
        impl = self._op.select(self._impl, *call)
        if impl == REFERENCE:  # which takes one tensor after the other, and may stop between two: what it made stays
            batch.new.clear()
        if impl == REFERENCE or torch._C._len_torch_dispatch_stack() > 0:  # who watches operators shall see one
            self._op.directions["update"](impl, *call)
            torch.autograd.graph.increment_version(params)
            return
        table, tensors = Table(params, grads, lists, steps, channels, dims), _together(params, lists, steps)
        prepared = _Prepared(asked_for(self._impl), _kinds(params, grads), tensors, impl, table)
        self._prepared[device] = prepared
        self._launch(prepared, batch)

    def _launch(self, prepared: _Prepared, batch: _Batch) -> None:
        scale, inf = self._scaling(prepared.table.device)
        self._op.module(prepared.impl).launch(prepared.table, batch.numbers, scale, inf)
        torch.autograd.graph.increment_version(batch.params)  # a backward notices what it saved

    def _lists(self, batch: _Batch) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The states of each kind, and the counters."""
        return [[state[name] for state in batch.states] for name in self._states], [s["step"] for s in batch.states]

    def _scaling(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What a GradScaler has left: the scale of the gradients, and whether one of them is not finite."""
        grad_scale, found_inf = (
            value if value is None else torch.as_tensor(value).to(device, torch.float32, non_blocking=True)
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        return grad_scale, found_inf

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__:  # `load_state_dict`, which has changed nothing yet
            self._adopt(state["param_groups"], state["state"])
        super().__setstate__(state)
        self._prepared = {}

    def _adopt(self, groups: list[dict[str, Any]], states: dict[Any, dict[str, Tensor]]) -> None:
        """Refuse loaded groups and state that are of other tensors or channels; put the counters on their devices."""
        name = type(self).__name__
        for g, (group, own) in enumerate(zip(groups, self.param_groups)):
            # Of the group: torch adds a key to the defaults when a state is loaded.
            if missing := sorted(key for key in ("channels", *self.defaults) if key in own and key not in group):
                raise ValueError(f"{name}: the state dict was made by another optimizer: group {g} lacks {missing}")
            for i, (p, record, saved) in enumerate(zip(own["params"], own["channels"], group["channels"])):
                where = f"entry {i} of group {g}"
                if difference := _difference(record, saved):
                    raise ValueError(f"{name}: the state dict is of other channels: {where} {difference}")
                state = states.get(p) or {}
                if state and set(state) != {*self._states, "step"}:
                    raise ValueError(f"{name}: the state dict was made by another optimizer: {where} has {list(state)}")
                shape = compact_shape(p, record["channels"], record["dim"])
                for key in self._states:
                    if state and tuple(state[key].shape) != shape:
                        got = list(state[key].shape)
                        raise ValueError(f"{name}: {key} of {where} must be {list(shape)}, got {got}")
                if state:
                    state["step"] = torch.as_tensor(state["step"]).to(p.device, torch.float32)
            group["channels"] = own["channels"]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for g, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {g}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", "channels")]
        return "\n".join([*lines, ")"])


def _together(params: list[Tensor], lists: list[list[Tensor]], steps: list[Tensor]) -> list[Tensor]:
    return [*params, *steps, *chain.from_iterable(lists)]


def _kinds(params: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """All that decides how a kernel walks these tensors, but for their addresses."""
    kinds: list[Any] = [*map(_KIND, params), *map(_KIND, grads), *map(Tensor.stride, params)]
    if all(grad.layout is torch.strided for grad in grads):  # a sparse one has no strides, and is about to be refused
        kinds += map(Tensor.stride, grads)
    return kinds


def _record(name: str, entry: Any) -> dict[str, Any]:
    """What a state dict tells of an entry: the shape of the tensor, and its channels, copied, with their dim."""
    if not isinstance(entry, (Tensor, Channels)):
        raise TypeError(f"{name}: params must hold tensors and Channels, got {type(entry).__name__}")
    if isinstance(entry, Tensor):
        check_param(name, "params", entry)
        return {"shape": list(entry.shape), "dim": 0, "channels": None}
    check_param(name, "Channels.tensor", entry.tensor)
    check_selection(name, entry.tensor, entry.channels, entry.dim)
    return {"shape": list(entry.tensor.shape), "dim": entry.dim, "channels": entry.channels.clone()}


def _difference(own: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """How the record of an entry differs from a saved one, in words."""
    for key in ("shape", "dim"):
        if own[key] != saved[key]:
            return f"has {key} {own[key]}, saved {saved[key]}"
    channels = [None if c is None else c.tolist() for c in (own["channels"], saved["channels"])]
    if channels[0] != channels[1]:
        said = ["the whole tensor" if c is None else f"{len(c)} channels starting {c[:5]}" for c in channels]
        return f"updates {said[0]}, saved {said[1]}"
    return None
