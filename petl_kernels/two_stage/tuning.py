"""Stage 2: the chosen channels train, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from petl_kernels._names import check_model, freeze_all_but, match, some
from petl_kernels.nn import ChannelLinear
from petl_kernels.nn._check import check_choice
from petl_kernels.nn.channel_linear import obstacle
from petl_kernels.ops._select import AUTO
from petl_kernels.ops.channel_linear import OP
from petl_kernels.two_stage.selection import Selection

# They hand the weights of their linears to a kernel of torch's and never call them (the layer: in inference).
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _Original(NamedTuple):
    """The bits of some channels of a frozen tensor before they trained."""

    frozen: Tensor
    dim: int
    channels: Tensor
    values: Tensor


@dataclass(eq=False)
class Tuned:
    """What `tune_channels` did. `print` it; `undo` takes it back.

    Attributes:
        tuned: module name -> the ChannelLinear that stands there now.
        trained: names of all parameters that train.
        frozen: names of parameters that trained before and do not any more. What an earlier stage made of them belongs
            to the task: give them to `save_task(include=)`.
    """

    tuned: dict[str, ChannelLinear]
    trained: list[str]
    frozen: list[str]
    _model: nn.Module = field(repr=False)
    _linears: dict[str, nn.Linear] = field(repr=False)
    _originals: dict[nn.Module, list[_Original]] = field(repr=False)
    _flags: list[tuple[nn.Parameter, bool]] = field(repr=False)

    def __str__(self) -> str:
        parameters = dict(self._model.named_parameters())
        count = sum(parameters[name].numel() for name in self.trained if name in parameters)
        lines = [f"{len(self.tuned)} linears tuned in part; {count:,} parameters train"]
        lines += [f"  {name}: {layer.extra_repr()}" for name, layer in self.tuned.items()]
        if self.frozen:
            lines.append(f"  trained before, frozen now (save_task include=): {some(self.frozen)}")
        return "\n".join(lines)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the linears back: the modules, the bits of their channels, `requires_grad` of every parameter.

        Layer norms or a head that trained meanwhile keep their values.

        Raises:
            RuntimeError: a ChannelLinear is no longer in its place, or has other channels; nothing is changed.
        """
        if gone := [name for name in self._linears if not self._stands(name)]:
            raise RuntimeError(f"Tuned.undo: the ChannelLinear that was made no longer stands at {some(gone)}")
        for name, linear in self._linears.items():
            training = self._model.get_submodule(name).training
            self._model.set_submodule(name, linear.train(training))
        for originals in self._originals.values():
            for frozen, dim, channels, values in originals:
                frozen.index_copy_(dim, channels.to(frozen.device), values.to(frozen))
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def _stands(self, name: str) -> bool:
        layer = _find(self._model, name)
        channels = [original.channels for original in self._originals.get(layer, [])]
        return bool(channels) and torch.equal(layer.channels.cpu(), channels[0].cpu())


def tune_channels(
    model: nn.Module,
    selection: Selection,
    *,
    dim: int = 0,
    bias: bool = True,
    keep_trainable: bool | str | Iterable[str] = False,
    impl: str | None = None,
) -> Tuned:
    """Let the selected channels of some linears train, in place: each becomes a `petl_kernels.nn.ChannelLinear`.

    That rows or columns of the backbone's own linears are what is tuned is our choice: the module that TTC-Tuning
    (arXiv:2303.07910) trains on its channels is not public. SCT's is `petl_kernels.nn.ChannelAdapter`.

    Args:
        model: its linears are replaced, wherever they stand; a linear of which nothing is selected stays and is frozen.
        selection: from `select`, or made by hand.
        dim: 0 tunes output rows (scores of side "output"), 1 input columns (side "input").
        bias: with dim=0, tune the bias of the chosen rows too.
        keep_trainable: what else trains. False: nothing. True: what trains now. Names or glob patterns of parameters:
            these. A head has to train.
        impl: passed on to `petl_kernels.channel_linear`.

    Returns:
        The report, which also holds the original bits of the chosen channels for `undo`.

    Raises:
        TypeError: bad types.
        ValueError: a selected module that is gone, is no plain nn.Linear, has another width, hooks, a weight that is
            also used elsewhere, or a parent that reads its weight without calling it; patterns that match nothing.
            Nothing is changed.
    """
    check_model("tune_channels", model)
    if not isinstance(selection, Selection):
        raise TypeError(f"tune_channels: selection must be a Selection, got {type(selection).__name__}")
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"tune_channels: dim must be 0 (output rows) or 1 (input columns), got {dim!r}")
    check_choice("tune_channels", "impl", impl, (None, AUTO, *OP.impls))
    places = _places(model, selection, dim)
    parameters = dict(model.named_parameters())
    before = [name for name, p in parameters.items() if p.requires_grad]
    if isinstance(keep_trainable, bool):
        kept = before if keep_trainable else []
    else:
        kept = match("tune_channels", "keep_trainable", keep_trainable, parameters)
    flags, grads = [(p, p.requires_grad) for p in parameters.values()], [p.grad for p in parameters.values()]
    layers: dict[str, ChannelLinear] = {}
    linears: dict[str, nn.Linear] = {}
    try:  # all that needs memory, before the model is changed
        for linear, names in places.items():
            channels = selection[names[0]].to(linear.weight.device)
            layer = ChannelLinear.from_linear(linear, channels, dim=dim, bias=bias, impl=impl)
            layers[names[0]] = layer.train(linear.training)
            linears.update(dict.fromkeys(names, linear))
        originals: dict[nn.Module, list[_Original]] = {layer: _originals(layer) for layer in layers.values()}
    except BaseException:
        for (p, flag), grad in zip(flags, grads):
            p.requires_grad_(flag).grad = grad
        raise
    for name, linear in linears.items():
        model.set_submodule(name, layers[places[linear][0]])
    compact = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    owned = {id(p) for layer in layers.values() for p in (layer.weight, layer.bias)}
    freeze_all_but(model, compact + [parameters[name] for name in kept if id(parameters[name]) not in owned])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = [name for name in before if not parameters[name].requires_grad and id(parameters[name]) not in owned]
    return Tuned(layers, trained, frozen, model, linears, originals, flags)


def merge_channels(model: nn.Module) -> list[str]:
    """Turn every ChannelLinear of the model into a plain nn.Linear with the tuned weight, exactly; return the names."""
    check_model("merge_channels", model)
    if isinstance(model, ChannelLinear):
        raise ValueError("merge_channels: model is itself a ChannelLinear; use its merge()")
    merged: dict[nn.Module, nn.Linear] = {}
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ChannelLinear)]
    for name in names:
        layer = _find(model, name)
        if layer not in merged:
            merged[layer] = layer.merge()
        model.set_submodule(name, merged[layer])
    return names


def _places(model: nn.Module, selection: Selection, dim: int) -> dict[nn.Linear, list[str]]:
    """The linears to replace with all names each has, the selected one first; every error is found here."""
    modules = dict(model.named_modules(remove_duplicate=False))
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))
    places: dict[nn.Linear, list[str]] = {}
    for name in selection:
        reason = _reason(name, modules, selection, dim, users)
        if reason is not None:
            raise ValueError(f"tune_channels: {name!r} {reason}")
        if modules[name] in places:
            raise ValueError(f"tune_channels: {name!r} is the same module as {places[modules[name]][0]!r}")
        if len(selection[name]):
            aliases = [alias for alias, module in modules.items() if module is modules[name] and alias != name]
            places[modules[name]] = [name, *aliases]
    return places


def _reason(
    name: str, modules: dict[str, nn.Module], selection: Selection, dim: int, users: dict[int, set[int]]
) -> str | None:
    """Why the channels of this module cannot be tuned, or None."""
    linear = modules.get(name)
    if linear is None or name == "":
        return "is not a module inside of the model (any more)"
    if isinstance(linear, ChannelLinear):
        return "is a ChannelLinear already; merge_channels first"
    wrong = obstacle(linear)
    if wrong is not None:
        return f"cannot be tuned: {wrong}"
    width = linear.get_parameter("weight").shape[dim]
    if width != selection.widths[name]:
        return f"has {width} channels in dim {dim}, the selection was made of {selection.widths[name]}"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "has hooks, which a ChannelLinear would not call; remove them"
    if any(len(users[id(p)]) > 1 for p in linear.parameters(recurse=False)):
        return "shares its weight or bias with another module, which would be tuned along"
    for alias, module in modules.items():
        if module is linear and isinstance(modules[alias.rpartition(".")[0]], _READERS):
            reader = type(modules[alias.rpartition(".")[0]]).__name__
            return f"belongs to an nn.{reader}, which reads its weight without calling it"
    return None


def _originals(layer: ChannelLinear) -> list[_Original]:
    channels = layer.channels.clone()
    trained = ((frozen, dim, values) for _, frozen, dim, values in layer.parts() if values is not None)
    return [_Original(frozen, dim, channels, values.detach().clone()) for frozen, dim, values in trained]


def _find(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
