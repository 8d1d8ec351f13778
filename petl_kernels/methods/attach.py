"""Put a method into a model, freeze the rest, and take it out again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from petl_kernels._names import check_model, freeze_all_but, match
from petl_kernels.methods.blocks import find_blocks
from petl_kernels.methods.insertions import Insertion
from petl_kernels.methods.registry import METHODS, Method


@dataclass(eq=False)
class Attached:
    """What `attach` did. `print` it; `detach` takes it back.

    Attributes:
        method: its name.
        inserted: module name -> what was put there.
        trained: names of all parameters that train.
    """

    method: str
    inserted: dict[str, str]
    trained: list[str]
    _model: weakref.ref[nn.Module] = field(repr=False)
    _removals: list[Callable[[], None]] = field(repr=False)
    _flags: list[tuple[nn.Parameter, bool]] = field(repr=False)

    def __str__(self) -> str:
        model = self._model()
        sizes = {} if model is None else {name: p.numel() for name, p in model.named_parameters()}
        count, total = sum(sizes.get(name, 0) for name in self.trained), sum(sizes.values())
        share = f" of {total:,}, {100 * count / total:.2f} %" if total else ""
        lines = [f"{self.method}: {len(self.inserted)} modules inserted; {count:,} parameters train{share}"]
        return "\n".join(lines + [f"  {name}: {what}" for name, what in self.inserted.items()])

    def detach(self) -> None:
        """Take everything out again; what else trained keeps its values. A second time does nothing.

        Raises:
            RuntimeError: a module that was replaced has been replaced again.
        """
        while self._removals:
            self._removals[-1]()
            self._removals.pop()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags = []
        model = self._model()
        if model is not None:
            _attached.pop(model, None)


_attached: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module, method: str | Method, *, keep_trainable: bool | str | Iterable[str] = False, **options: Any
) -> Attached:
    """Insert a method into every transformer block of a model, in place, and freeze the rest.

    Knows the blocks that `petl_kernels.methods.find_blocks` finds. The model's own parameters keep their names; what is
    inserted appears as `<module>.petl`, or, where a linear is replaced, under the linear's name.

    Args:
        model: changed in place.
        method: a name of `petl_kernels.methods.METHODS` (`petl-kernels methods` lists them), or a `Method`.
        keep_trainable: what trains beside the method, and beside the layer norms where they belong to it. False:
            nothing. True: what trains now. Names or glob patterns of parameters, such as "classifier.*": these.
        options: of the method: `bottleneck`, `rank`, and what else its module takes.

    Returns:
        The report, which also takes the method out again.

    Raises:
        TypeError: not a model; options that the method does not take.
        ValueError: an unknown method, one that `attach` cannot place, a model without such blocks or without what the
            method needs; patterns that match nothing. Nothing is changed.
        RuntimeError: the model has a method attached already.
    """
    check_model("attach", model)
    chosen = _chosen(method)
    if model in _attached:
        raise RuntimeError(f"attach: {_attached[model].method!r} is attached to this model; detach it first")
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"attach: {type(model).__name__} has no transformer block of a known kind")
    named = dict(model.named_parameters())
    if isinstance(keep_trainable, bool):
        kept = [p for p in named.values() if p.requires_grad] if keep_trainable else []
    else:
        kept = [named[name] for name in match("attach", "keep_trainable", keep_trainable, named)]
    flags = [(p, p.requires_grad) for p in named.values()]
    grads = [(p, p.grad) for p in named.values()]
    removals: list[Callable[[], None]] = []
    try:
        assert chosen.place is not None  # `_chosen`
        insertions = [each for block in blocks for each in chosen.place(model, block, **options)]
        own = _trained(model, chosen, insertions)
        if not own:
            raise ValueError(f"attach: {chosen.name} finds nothing to train in {type(model).__name__}")
        for each in insertions:
            removals.append(each.insert(model))
        removals.append(_keep_padding(model))
    except BaseException:
        for remove in reversed(removals):
            remove()
        for (p, flag), (_, grad) in zip(flags, grads):
            p.requires_grad_(flag).grad = grad
        raise
    freeze_all_but(model, own + kept)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    inserted = {each.at: " ".join(repr(each.module).split()) for each in insertions}
    report = Attached(chosen.name, inserted, trained, weakref.ref(model), removals, flags)
    _attached[model] = report
    return report


def detach(model: nn.Module) -> None:
    """Take out what `attach` put into the model.

    Raises:
        TypeError: not a model.
        ValueError: nothing is attached to it. (A deepcopy carries the method, but not what it replaced.)
    """
    check_model("detach", model)
    if model not in _attached:
        raise ValueError("detach: no method is attached to this model")
    _attached[model].detach()


def _keep_padding(model: nn.Module) -> Callable[[], None]:
    """Have nn.TransformerEncoder pass padded batches as they are, until the function that is returned is called.

    In inference it packs them as nested tensors, for a fast path that is off where there are hooks.
    """
    packing = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]

    def pack(use: bool) -> None:
        for encoder in packing:
            encoder.use_nested_tensor = use

    pack(False)
    return partial(pack, True)


def _is_norm(module: nn.Module) -> bool:
    """Models have RMS norms of classes of their own: LlamaRMSNorm, Phi3RMSNorm, T5LayerNorm."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    own = [*module.parameters(recurse=False)]
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and all(p.dim() == 1 for p in own)


def _chosen(method: str | Method) -> Method:
    if not isinstance(method, Method):
        if method not in METHODS:
            raise ValueError(f"attach: method must be one of {tuple(METHODS)}, got {method!r}")
        method = METHODS[method]
    if method.place is None:
        raise ValueError(
            f"attach: {method.name} has to be called by the attention itself; use petl_kernels.nn.{method.module}"
        )
    return method


def _trained(model: nn.Module, method: Method, insertions: list[Insertion]) -> list[nn.Parameter]:
    """What the method trains: of its modules all that is not frozen, and the layer norms where they belong to it."""
    own = [p for each in insertions for p in each.module.parameters() if p.requires_grad]
    if method.norms:
        norms = [m for m in model.modules() if _is_norm(m)]
        own += [p for norm in norms for p in norm.parameters(recurse=False)]
    return own
