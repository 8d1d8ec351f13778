"""Checks of constructor arguments that layers share; each error names layer, argument, wanted and got."""

from __future__ import annotations

from typing import Any


def check_size(owner: str, name: str, value: Any, other: str = "") -> None:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be {other}an integer of at least 1, got {value!r}")


def check_heads(owner: str, d_model: Any, heads: Any) -> None:
    """A width and a number of heads that divides it."""
    check_size(owner, "d_model", d_model)
    check_size(owner, "heads", heads)
    if d_model % heads:
        raise ValueError(f"{owner}: heads must divide d_model = {d_model}, got {heads}")


def check_number(owner: str, name: str, value: Any, other: str = "") -> None:
    """A float or an int."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{owner}: {name} must be {other}a float, got {value!r}")


def check_probability(owner: str, name: str, value: Any) -> None:
    """A probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{owner}: {name} must be a probability in [0, 1), got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...], other: str = "") -> None:
    """One of these values."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be {other}one of {choices}, got {value!r}")
