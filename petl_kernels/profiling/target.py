"""What is profiled: a built-in model, or what a function of the user's returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from petl_kernels.methods import METHODS, attach
from petl_kernels.testing.models import BERT, Encoder, ViT

BUILT_IN: dict[str, Callable[[], Encoder]] = {"bert-base": BERT, "vit-b16": ViT}
FUNCTION = "build"  # of a script that is given without one
WANTED = "(model, batch, loss): an nn.Module, a batch or an iterable of batches, and loss(model, batch) -> scalar"


class TargetError(ValueError):
    """What was named cannot be profiled; the message says why."""


@dataclass(frozen=True)
class Options:
    """How a target is built.

    Attributes:
        device, dtype: where the model goes, and the dtype of all its parameters; None leaves them as built.
        method, settings: of `petl_kernels.attach`, for built-in models.
        batch: samples, for built-in models.
        seed: set before every build.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    seed: int = 0


@dataclass
class Parts:
    """A model, where its batches come from, and `loss(model, batch)`."""

    model: nn.Module
    feed: Feed
    loss: Callable[[nn.Module, Any], Tensor]


class Feed:
    """Batches on a device: the same one again and again, or those of an iterable, from the start when it ends."""

    def __init__(self, batch: Any, device: str) -> None:
        self._source, self._device = batch, device
        single = isinstance(batch, (Tensor, Mapping, tuple, list)) or not isinstance(batch, Iterable)
        self._batches: Iterator[Any] | None = None if single else iter(batch)

    def next(self) -> Any:
        """The next batch, on the device."""
        if self._batches is None:
            return _moved(self._source, self._device)
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = iter(self._source)
            batch = next(self._batches, None)
            if batch is None:
                raise TargetError("its batches are an iterable that ends and cannot be iterated again") from None
        return _moved(batch, self._device)


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(batch)  # such as the output of a tokenizer
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
    return moved.to(device) if moved is batch and hasattr(batch, "to") else moved


@dataclass(frozen=True)
class Target:
    """A name and how to build what it stands for, as often as needed with the same weights.

    Attributes:
        bare: whether the function can also build the model without its adapters.
    """

    name: str
    options: Options
    bare: bool
    _make: Callable[..., tuple[nn.Module, Any, Callable[..., Tensor]]]

    def build(self, adapters: bool = True) -> Parts:
        """A fresh model on the device, in training mode.

        Raises:
            TargetError: the function failed, or returned something else than it should.
        """
        torch.manual_seed(self.options.seed)
        try:
            made: Any = self._make() if adapters else self._make(adapters=False)
        except Exception as error:
            raise TargetError(f"{self.name}: building it failed with {type(error).__name__}: {error}") from error
        if not (isinstance(made, tuple) and len(made) == 3):
            what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
            raise TargetError(f"{self.name}: it has to return {WANTED}; it returned {what}")
        model, batch, loss = made
        if not isinstance(model, nn.Module):
            raise TargetError(f"{self.name}: its model has to be an nn.Module, and is of type {type(model).__name__}")
        if not callable(loss):
            raise TargetError(f"{self.name}: its loss has to be a function of (model, batch), and is {loss!r}")
        model.to(device=self.options.device, dtype=self.options.dtype).train()
        return Parts(model, Feed(batch, self.options.device), loss)


def find_target(name: str, options: Options) -> Target:
    """The target of a name.

    Args:
        name: "bert-base" or "vit-b16"; "package.module:function"; "script.py:function", or "script.py" for its
            function `build`. The function returns (model, batch, loss); where it takes an argument `adapters`, it is
            called with False for the model without its adapters, too.
        options: see there.

    Raises:
        TargetError: there is no such model, script, module or function; options that it does not take.
    """
    if name in BUILT_IN:
        return Target(name, options, False, lambda: _built_in(name, options))
    for option, value in (("--method", options.method), ("--batch", options.batch), ("--option", options.settings)):
        if value:
            raise TargetError(f"{option} is for the built-in models {tuple(BUILT_IN)}; {name!r} brings its own")
    path, colon, function = name.rpartition(":")
    if not colon:
        path, function = name, FUNCTION
    if not colon and not path.endswith(".py"):
        raise TargetError(
            f"{name!r} is no built-in model {tuple(BUILT_IN)}, no script.py, and no module:function to import"
        )
    module = _script(path) if path.endswith(".py") else _imported(path)
    make: Any = module
    for part in function.split("."):
        make = getattr(make, part, None)
    if not callable(make):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        own = [key for key in own if inspect.isfunction(vars(module)[key]) and not key.startswith("_")]
        raise TargetError(f"{path} has no function {function!r}; it has {', '.join(own) or 'none'}")
    return Target(name, options, _takes_adapters(make), make)


def _takes_adapters(make: Callable[..., Any]) -> bool:
    try:
        return "adapters" in inspect.signature(make).parameters
    except ValueError:  # of something built in
        return False


def _script(path: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise TargetError(f"there is no script {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # dataclasses and pickle look there
    sys.path.insert(0, str(file.parent.resolve()))  # as `python script.py` has it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"running {path} failed with {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return module


def _imported(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TargetError(f"importing {name!r} failed with {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")


def _built_in(name: str, options: Options) -> tuple[nn.Module, Any, Callable[..., Tensor]]:
    method = options.method or "houlsby"
    if method not in METHODS:
        raise TargetError(f"--method has to be one of {', '.join(METHODS)}, got {method!r}")
    model = BUILT_IN[name]()
    attach(model, method, keep_trainable="head.*", **options.settings)
    # On the host, as data is: the step moves it.
    inputs = model.batch(options.batch or 8, "cpu")
    if inputs.is_floating_point() and options.dtype is not None:
        inputs = inputs.to(options.dtype)
    return model, (inputs, torch.zeros(len(inputs), dtype=torch.int64)), _classify


def _classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs).float(), labels)
