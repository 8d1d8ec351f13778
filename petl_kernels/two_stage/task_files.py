"""What a task changed in a backbone, as one small file that goes onto the frozen backbone and off again."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petl_kernels._names import check_model, match, some
from petl_kernels.nn import ChannelLinear

FORMAT, VERSION = "petl_kernels.task", 1
OWN = ("channels", "channel_weight", "channel_bias")  # what a ChannelLinear has beside its linear's tensors
CHANNELS = "/channels"  # in the file, after the name of a tensor of which it holds some channels only


class _Change(NamedTuple):
    """One tensor of the backbone, or some channels of it along `dim`, and what they become."""

    name: str
    dim: int
    channels: Tensor | None
    values: Tensor


def save_task(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    backbone: nn.Module | Mapping[str, Tensor] | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> list[str]:
    """Write what a task changed into one safetensors file: indices and values.

    Of every ChannelLinear its channels and their trained values; of everything else the tensors that train, those that
    `include` names and, if `backbone` is given, also those that differ from it. Without a backbone, what stage 1 tuned
    and stage 2 froze has to be named: `include=tuned.frozen`.

    The file is written beside the old one, flushed to disk and renamed over it: a crash leaves the old one as it was.

    Args:
        path: of the file, by custom `.safetensors`.
        model: with ChannelLinears in the place of some linears.
        backbone: the plain model before any tuning, or its state dict.
        include: names or glob patterns of tensors of the state dict that are saved whether they train or not.
        exclude: names or glob patterns of tensors that are not saved, and may have another shape where the file is
            applied: a head of its own.

    Returns:
        The names of the backbone's tensors that the file changes.

    Raises:
        TypeError: bad types.
        ValueError: patterns that match nothing; a backbone with other names or shapes, or one from which a tuned linear
            differs outside of its channels; nothing to save.
        OSError: the file cannot be written; an old one is intact.
    """
    check_model("save_task", model)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChannelLinear)}
    own = {_join(name, part) for name in layers for part in OWN}
    partly = {_join(name, part) for name in layers for part in ("weight", "bias")}
    state = {name: t for name, t in _state(model).items() if name not in own}
    left_out = set(match("save_task", "exclude", exclude, state))
    chosen = {name for name, t in state.items() if t.requires_grad} | set(match("save_task", "include", include, state))
    state = {name: t for name, t in state.items() if name not in left_out}
    if backbone is not None:
        chosen |= _differing(state, layers, partly, _backbone_state(backbone))
    tied = _tied(state)
    changes = [_Change(n, 0, None, t) for n, t in state.items() if n in chosen and n not in partly and n not in tied]
    for name, layer in layers.items():
        for part, _, dim, trained in layer.parts():
            full = _join(name, part)
            if trained is not None and full in state and full not in tied:
                changes.append(_Change(full, dim, layer.channels, trained))
    if not changes:
        raise ValueError("save_task: the model has no ChannelLinear and nothing in it trains")
    from safetensors.torch import save  # only those who use it pay for the import

    about = {
        "version": VERSION,
        "dims": {c.name: c.dim for c in changes if c.channels is not None},
        "backbone": {name: list(t.shape) for name, t in state.items()},
        "tied": tied,
        "exclude": [exclude] if isinstance(exclude, str) else list(exclude),
    }
    metadata = {FORMAT: json.dumps(about)}  # one entry, because safetensors writes several in any order
    tensors = {change.name: change.values for change in changes}
    tensors |= {c.name + CHANNELS: c.channels.int() for c in changes if c.channels is not None}
    _write_file(Path(path), save({name: t.detach().clone().contiguous() for name, t in tensors.items()}, metadata))
    return [change.name for change in changes]


class Applied:
    """A task on its backbone. `remove`, or the end of a `with`, puts the backbone's own bits back.

    Attributes:
        path: the file that was applied.
        changed: names of the tensors it changed.
    """

    def __init__(self, path: Path, model: nn.Module, originals: list[_Change]) -> None:
        self.path, self.changed = path, [change.name for change in originals]
        self._model = weakref.ref(model)  # `_applied` holds this for as long as the model lives, and no longer
        self._originals = originals

    def remove(self) -> None:
        """Write the original bits back; a second time does nothing.

        Raises:
            RuntimeError: a tensor is gone or has another shape; nothing is changed.
        """
        model = self._model()
        if model is None or not self._originals:
            return
        state = _state(model)
        if gone := [c.name for c in self._originals if not _fits(state, c)]:
            raise RuntimeError(f"Applied.remove: the model no longer has {some(gone)} as the task found them")
        _write_changes(state, self._originals)
        for module in model.modules():
            _applied.pop(module, None)
        self._originals = []

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "applied" if self._originals else "removed"
        return f"Applied({str(self.path)!r}, {len(self.changed)} tensors changed, {state})"


_applied: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()


def apply_task(model: nn.Module, path: str | os.PathLike[str]) -> Applied:
    """Write a task's channels and tensors into the plain backbone, in place, keeping the original bits of just these.

    Values are rounded to the backbone's dtype, as a ChannelLinear rounds them when it computes. One task at a time: a
    second is refused until the first is removed, so that tasks never mix.

    Args:
        model: the backbone, with the names and shapes of the one that the file was made for.
        path: a file from `save_task`.

    Returns:
        A handle that takes the task off again; also a context manager: `with apply_task(model, path): ...`.

    Raises:
        OSError: no such file.
        TypeError: not a model.
        ValueError: not a task file, or one made for another backbone; nothing is changed.
        RuntimeError: the model has a task applied, or holds ChannelLinears; nothing is changed.
    """
    check_model("apply_task", model)
    path = Path(path)
    modules = list(model.modules())
    other = next((_applied[m] for m in modules if m in _applied), None)
    if other is not None:
        raise RuntimeError(f"apply_task: {str(other.path)!r} is applied to this model; remove it first")
    if any(isinstance(m, ChannelLinear) for m in modules):
        raise RuntimeError("apply_task: the model holds ChannelLinears; undo them or call merge_channels first")
    task, state = _read(path), _state(model)
    _check_backbone(path, task, state)
    if wrong := [change.name for change in task.changes if not _fits(state, change)]:
        raise ValueError(f"apply_task: {str(path)!r} does not fit the backbone at {some(wrong)}")
    originals = [change._replace(values=_slice(state[change.name], change).clone()) for change in task.changes]
    try:
        _write_changes(state, task.changes)
    except BaseException:
        _write_changes(state, originals)
        raise
    applied = Applied(path, model, originals)
    _applied.update(dict.fromkeys(modules, applied))
    return applied


class _Task(NamedTuple):
    """A file's content."""

    changes: list[_Change]
    shapes: dict[str, list[int]]  # of the backbone's tensors
    tied: dict[str, str]
    exclude: list[str]


def _read(path: Path) -> _Task:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"apply_task: there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"apply_task: {str(path)!r} is not a whole task file: {error}") from error
    if FORMAT not in metadata:
        raise ValueError(f"apply_task: {str(path)!r} is not a task file")
    try:
        about = json.loads(metadata[FORMAT])
        if about["version"] != VERSION:
            raise ValueError(f"apply_task: {str(path)!r} has format version {about['version']}, not {VERSION}")
        dims, *rest = (about[name] for name in ("dims", "backbone", "tied", "exclude"))
        partly = [
            _Change(name, dim, tensors.pop(name + CHANNELS).long(), tensors.pop(name)) for name, dim in dims.items()
        ]
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"apply_task: {str(path)!r} is not a whole task file: {error!r}") from error
    return _Task([*(_Change(name, 0, None, values) for name, values in tensors.items()), *partly], *rest)


def _check_backbone(path: Path, task: _Task, state: Mapping[str, Tensor]) -> None:
    """The names, shapes and shared tensors that the file was made for."""
    here = {n: t for n, t in state.items() if not any(fnmatchcase(n, pattern) for pattern in task.exclude)}
    missing, extra = [n for n in task.shapes if n not in here], [n for n in here if n not in task.shapes]
    problems = ([f"it lacks {some(missing)}"] if missing else []) + ([f"it has {some(extra)} more"] if extra else [])
    for name, shape in task.shapes.items():
        if name in here and list(here[name].shape) != shape and len(problems) < 4:
            problems.append(f"{name!r} is {list(here[name].shape)}, not {shape}")
    if not problems and _tied(here) != task.tied:
        problems = ["other tensors are shared"]
    if problems:
        raise ValueError(f"apply_task: {str(path)!r} was made for another backbone: {'; '.join(problems)}")


def _fits(state: Mapping[str, Tensor], change: _Change) -> bool:
    tensor = state.get(change.name)
    if tensor is None:
        return False
    shape = list(tensor.shape)
    if change.channels is not None:
        if not all(0 <= channel < shape[change.dim] for channel in change.channels.tolist()):
            return False
        shape[change.dim] = len(change.channels)
    return shape == list(change.values.shape)


def _slice(tensor: Tensor, change: _Change) -> Tensor:
    if change.channels is None:
        return tensor.detach()
    return tensor.detach().index_select(change.dim, change.channels.to(tensor.device))


@torch.no_grad()
def _write_changes(state: Mapping[str, Tensor], changes: Iterable[_Change]) -> None:
    for name, dim, channels, values in changes:
        tensor = state[name]
        if channels is None:
            tensor.copy_(values)
        else:
            tensor.index_copy_(dim, channels.to(tensor.device), values.to(tensor))


def _differing(
    state: Mapping[str, Tensor], layers: Mapping[str, ChannelLinear], partly: set[str], backbone: Mapping[str, Tensor]
) -> set[str]:
    """Names of the tensors that differ from the backbone's; tuned linears may differ in their channels only."""
    if wrong := [n for n, t in state.items() if n not in backbone or backbone[n].shape != t.shape]:
        raise ValueError(f"save_task: backbone has no tensors like the model's {some(wrong)}")
    for name, layer in layers.items():
        for part, frozen, dim, trained in layer.parts():
            if (full := _join(name, part)) not in state:
                continue
            ours, theirs = frozen.detach().clone(), backbone[full].detach().to(frozen, copy=True)
            for tensor in (ours, theirs) if trained is not None else ():
                tensor.index_fill_(dim, layer.channels, 0)
            if not torch.equal(ours, theirs):
                raise ValueError(f"save_task: {full!r} differs from the backbone outside of its channels")
    return {n for n, t in state.items() if n not in partly and not torch.equal(t, backbone[n].to(t))}


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each further name of a tensor -> its first one, which stands for all in a file."""
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in state.items() if first.setdefault(id(t), name) != name}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by name; tied ones under each of their names."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _backbone_state(backbone: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(backbone, nn.Module):
        return _state(backbone)
    if isinstance(backbone, Mapping):
        return backbone
    raise TypeError(f"save_task: backbone must be a module or a state dict, got {type(backbone).__name__}")


def _write_file(path: Path, content: bytes) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the new name itself has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part
