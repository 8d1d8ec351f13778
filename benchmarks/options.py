"""Options that the benchmarks share, and the set-up of a program that compiles."""

from __future__ import annotations

import atexit
import os
import tempfile
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


def own_inductor_cache() -> None:
    """Have Inductor use a new folder, which goes when the program ends.

    Code that it kept from a run under another instruction set has crashed this one.
    """
    folder = tempfile.TemporaryDirectory(prefix="petl_kernels_inductor_")
    atexit.register(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
