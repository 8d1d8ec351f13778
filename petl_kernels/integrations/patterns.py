"""Hand-written bottleneck adapters: modules whose forward, traced, is one; no library has to be known.

    [norm ->] Linear -> activation [-> dropout] -> Linear [-> dropout] [-> * scale] [-> + residual]

with d_out of the first linear below its d_in (a feed-forward block widens, and is left alone), `scale` a number or a
Parameter of one or of d elements, and `residual` the input or a second argument of the forward. Dropout is a module or
`F.dropout`. The forward of such a module is traced symbolically, in training and in evaluation, and again when an
attribute of the module is set: a trace holds the numbers and flags that it saw. Modules that trace to anything else,
or not at all, are not touched and not reported: most modules are no adapters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from petl_kernels.integrations._swap import Fused, fused_class, observed, original_class
from petl_kernels.integrations.report import FuseReport
from petl_kernels.ops._validate import autocast_enabled
from petl_kernels.ops.bottleneck_adapter import bottleneck_adapter

_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.GELU: lambda m: "gelu_tanh" if m.approximate == "tanh" else "gelu",
    nn.SiLU: lambda m: "silu",
    nn.Tanh: lambda m: "tanh",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.LeakyReLU: lambda m: "leaky_relu" if m.negative_slope == 0.01 else None,
    nn.Identity: lambda m: "identity",
}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", F.leaky_relu: "leaky_relu"}
_FUNCTIONS |= {torch.tanh: "tanh", torch.sigmoid: "sigmoid", F.tanh: "tanh", F.sigmoid: "sigmoid", F.gelu: "gelu"}
_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class _Pattern:
    """What a forward was found to be; submodules and the scale by their names in the module."""

    norm: str | None
    down: str
    activation: str
    up: str
    dropouts: tuple[str, ...]
    scale: float | str
    residual: str  # "none", "input" or "argument"
    random: bool  # a functional dropout is at work in the mode that was traced


_Patterns = dict[bool, _Pattern | None]  # by the module's `training`


class _NoMatch(Exception):
    """The forward is something else."""


def _wanted(condition: bool) -> None:
    if not condition:
        raise _NoMatch


class _Reader:
    """Reads a traced forward from its output back to its input."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(module.named_modules())
        self._owner = module
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._dropouts: list[str] = []
        self._random = False
        _wanted(1 <= len(self._inputs) <= 2 and not any(node.args for node in self._inputs))  # args are defaults
        (self._output,) = (node for node in graph.nodes if node.op == "output")

    def read(self) -> _Pattern:
        node, residual = self._split_sum(self._output.args[0])
        node = self._skip_dropout(node)
        node, scale = self._split_product(node)
        up, node = self._linear(self._skip_dropout(node))
        activation, node = self._activation(self._skip_dropout(node))
        down, node = self._linear(node)
        norm = None
        if node.op == "call_module" and type(self._modules[node.target]) in _NORMS:
            norm, node = node.target, self._only(node)
        _wanted(node is self._inputs[0])
        _wanted(residual == "argument" or len(self._inputs) == 1)
        first = self._modules[down]
        _wanted(first.out_features < first.in_features and self._modules[up].in_features == first.out_features)
        return _Pattern(norm, down, activation, up, tuple(self._dropouts), scale, residual, self._random)

    def _only(self, node: Any) -> fx.Node:
        """The one input of a node that nothing else uses."""
        _wanted(len(node.users) == 1 and len(node.args) == 1 and isinstance(node.args[0], fx.Node))
        return node.args[0]

    def _split_sum(self, node: Any) -> tuple[Any, str]:
        added = node.op == "call_function" and node.target in (operator.add, torch.add)
        if not (added and not node.kwargs and len(node.args) == 2):
            return node, "none"
        for branch, other in (node.args, node.args[::-1]):
            if other in self._inputs and branch not in self._inputs:
                return branch, "input" if other is self._inputs[0] else "argument"
        raise _NoMatch

    def _split_product(self, node: Any) -> tuple[Any, float | str]:
        if not (node.op == "call_function" and node.target in (operator.mul, torch.mul) and len(node.args) == 2):
            return node, 1.0
        _wanted(len(node.users) == 1 and not node.kwargs)
        for branch, factor in (node.args, node.args[::-1]):
            if isinstance(branch, fx.Node) and isinstance(factor, (int, float)):
                return branch, float(factor)
            if isinstance(branch, fx.Node) and isinstance(factor, fx.Node) and factor.op == "get_attr":
                value = operator.attrgetter(str(factor.target))(self._owner)
                _wanted(isinstance(value, nn.Parameter))
                return branch, str(factor.target)
        raise _NoMatch

    def _skip_dropout(self, node: Any) -> Any:
        while True:
            if node.op == "call_module" and type(self._modules[node.target]) is nn.Dropout:
                self._dropouts.append(node.target)
            elif node.op == "call_function" and node.target is F.dropout:
                _wanted(node.kwargs.keys() == {"p", "training", "inplace"})  # as its own code passes them on
                self._random |= bool(node.kwargs["training"]) and node.kwargs["p"] > 0
            else:
                return node
            node = self._only(node)

    def _linear(self, node: Any) -> tuple[str, Any]:
        _wanted(node.op == "call_module" and type(self._modules[node.target]) is nn.Linear)
        return node.target, self._only(node)

    def _activation(self, node: Any) -> tuple[str, Any]:
        name = None
        if node.op == "call_module":
            name = _MODULES.get(type(self._modules[node.target]), lambda m: None)(self._modules[node.target])
        elif node.op == "call_function":
            options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
            if node.target is F.gelu and options:
                name = {"none": "gelu", "tanh": "gelu_tanh"}.get(options.pop("approximate", ""))
            else:
                name = _FUNCTIONS.get(node.target)
            _wanted(not options or (node.target is F.leaky_relu and options == {"negative_slope": 0.01}))
        elif node.op == "call_method":
            name = _METHODS.get(node.target)
        if name is None:
            raise _NoMatch
        return name, self._only(node)


def _find(module: nn.Module) -> _Patterns | None:
    """The patterns that the module's own forward follows, or None where it follows none in either mode."""
    sizes = [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]
    if len(sizes) != 2 or not any(a[0] > a[1] == b[0] for a, b in (sizes, sizes[::-1])):
        return None
    if "forward" in module.__dict__ or type(module).__module__.startswith("torch."):
        return None  # an nn.Sequential is swapped only with the module that holds it
    patterns = {mode: _trace(module, mode) for mode in (True, False)}
    return patterns if any(patterns.values()) else None


def _trace(module: nn.Module, training: bool) -> _Pattern | None:
    """The pattern that the module's own forward follows in this mode, or None."""
    modes, kind = [(part, part.training) for part in module.modules()], type(module)
    module.__class__ = original_class(module)  # type: ignore[assignment]
    try:
        for part, _ in modes:
            part.training = training
        return _Reader(module, fx.Tracer().trace(module)).read()
    except Exception:  # what cannot be traced (control flow on values, other signatures) is no such module
        return None
    finally:
        for part, mode in modes:
            part.training = mode
        module.__class__ = kind  # type: ignore[assignment]


class _FusedBottleneck(Fused):
    """In front of a hand-written adapter's class: its forward in one call of the op."""

    fused_patterns: _Patterns | None  # None where an attribute was set since they were traced

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # type: ignore[misc]
        if name != "training" and not name.startswith("fused_"):
            self.fused_patterns = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        pattern = _pattern_now(self)
        given = all(isinstance(t, Tensor) for t in args) and not kwargs
        if pattern is None or not given or len(args) != 1 + (pattern.residual == "argument"):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if _obstacle(self, pattern, args[0]) is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, *rest = args
        down, up, residual = _at(self, pattern.down), _at(self, pattern.up), None
        if pattern.residual != "none":
            residual = x if pattern.residual == "input" else rest[0]
        return bottleneck_adapter(
            x if pattern.norm is None else _at(self, pattern.norm)(x),
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            residual=residual,
            activation=pattern.activation,
            scale=_at(self, pattern.scale) if isinstance(pattern.scale, str) else pattern.scale,
            impl=self.fused_impl,
        )


def _pattern_now(module: Any) -> _Pattern | None:
    """The pattern of the mode that the module is in, or None."""
    if module.fused_patterns is None:
        module.fused_patterns = _find(module) or {True: None, False: None}
    training, evaluation = module.fused_patterns[True], module.fused_patterns[False]
    if training != evaluation and any(part.training is not module.training for part in module.modules()):
        return None  # traced in modes that are all alike
    return training if module.training else evaluation


def _at(module: Any, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _obstacle(module: Any, pattern: _Pattern, x: Tensor | None = None) -> str | None:
    """Why the module's own forward has to run, in general or for this x; None where the op may."""
    down, up = (_at(module, name) for name in (pattern.down, pattern.up))
    scale = _at(module, pattern.scale) if isinstance(pattern.scale, str) else None
    if any(type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter for linear in (down, up)):
        return "its projections are no plain nn.Linear (any more)"
    if scale is not None and scale.shape not in ((), (1,), (up.out_features,)):
        return f"its scale is of shape {list(scale.shape)}, not a number, [1] or [{up.out_features}]"
    if any(observed(part) for part in module.modules() if part is not module):
        return "a hook or a replaced forward on one of its parts"
    if x is None:
        return None
    if pattern.random or any(
        dropout.training and dropout.p > 0 for dropout in (_at(module, name) for name in pattern.dropouts)
    ):
        return "dropout is at work, by the random numbers of its own forward"
    dtypes = {p.dtype for p in (x, down.weight, up.weight, scale) if p is not None}
    autocast = autocast_enabled(x)
    if len(dtypes) > 1 and not autocast:
        return "its dtypes differ"
    if scale is not None and autocast:
        return "under autocast a learned scale makes the result float32"
    return None


def survey(model: nn.Module, report: FuseReport) -> None:
    """Enter every hand-written adapter of the model into the report; nothing is changed."""
    for name, module, patterns in _candidates(model):
        reason = _reason(module, patterns)
        if reason is None:
            report.fused[name] = _describe(module, patterns)
        else:
            report.skipped[name] = reason


def swap(model: nn.Module, impl: str | None) -> None:
    """Swap the class of every module whose forward is such an adapter."""
    for _, module, patterns in _candidates(model):
        if _reason(module, patterns) is None:
            module.__class__ = fused_class(_FusedBottleneck, original_class(module))
            module.fused_patterns, module.fused_impl = patterns, impl


def _candidates(model: nn.Module) -> list[tuple[str, Any, _Patterns]]:
    found: list[tuple[str, Any, _Patterns]] = []
    for name, module in model.named_modules():
        known = isinstance(module, _FusedBottleneck) or not hasattr(type(module), "fused_from")
        if known and (patterns := _find(module)) is not None:
            found.append((name, module, patterns))
    return found


def _reason(module: Any, patterns: _Patterns) -> str | None:
    """Why the module's own forward has to run in every call, or None."""
    usable = [pattern for pattern in patterns.values() if pattern is not None and not pattern.random]
    return _obstacle(module, usable[0]) if usable else "its functional dropout is at work in evaluation too"


def _describe(module: Any, patterns: _Patterns) -> str:
    usable = {mode: pattern for mode, pattern in patterns.items() if pattern is not None and not pattern.random}
    pattern = next(iter(usable.values()))
    down, up = (_at(module, name) for name in (pattern.down, pattern.up))
    residual = {"none": "bare branch", "input": "sequential", "argument": "parallel"}[pattern.residual]
    text = f"{residual}, {down.in_features} -> {down.out_features} -> {up.out_features}, {pattern.activation}"
    text += f", scale {pattern.scale}" + (f", after {pattern.norm}" if pattern.norm else "")
    if patterns[False] is None:
        text += "; only while it is training"
    elif True not in usable or any(_at(module, name).p > 0 for name in pattern.dropouts):
        text += "; not while its dropout is training" if patterns[True] is not None else "; not while it is training"
    return text + (", already fused" if isinstance(module, _FusedBottleneck) else "")
