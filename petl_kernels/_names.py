"""Names of modules and tensors, and the patterns that pick some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

# Which modules: a predicate on name and module, or names and glob patterns ("encoder.layer.*.output.dense").
Where = Callable[[str, nn.Module], bool] | str | Iterable[str]


def match(op: str, argument: str, patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that a name or glob pattern matches, in their order; a pattern that matches none is an error."""
    wanted, known = [patterns] if isinstance(patterns, str) else list(patterns), list(names)
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise TypeError(f"{op}: {argument} must hold names or glob patterns, got {type(pattern).__name__}")
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{op}: {argument} {pattern!r} matches nothing in the model")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in wanted)]


def find_modules(op: str, model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """The modules that `where` picks, by their first name."""
    check_model(op, model)
    named = dict(model.named_modules())
    if callable(where):
        chosen = [name for name, module in named.items() if where(name, module)]
    else:
        chosen = match(op, "where", where, named)
    if not chosen:
        raise ValueError(
            f"{op}: where picks no module of the model (its default: every nn.Linear whose weight is frozen)"
        )
    return {name: named[name] for name in chosen}


def freeze_all_but(model: nn.Module, kept: Iterable[nn.Parameter]) -> None:
    """Let exactly the parameters in `kept` train; the others lose their gradients too.

    An optimizer that holds a parameter goes on stepping it as long as it has a gradient, frozen or not.
    """
    trained = {id(parameter) for parameter in kept}
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False).grad = None


def check_model(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")


def some(names: Iterable[str]) -> str:
    """The first names of a long list, for an error."""
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
