"""Options that the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def some_of(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The comma-separated names that an option gives, all of them known."""
    names, known = text.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} must be some of {', '.join(known)}, got {', '.join(unknown)}")
    return names
