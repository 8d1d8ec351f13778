"""Options that the benchmarks share, and the set-up of a program that compiles."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence

import torch
import typer

from petl_kernels.benchmarking.provenance import ISA_VARIABLES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def some_of(option: str, names: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The names that an option gives, comma-separated or as a list, all of them known."""
    names, known = names.split(",") if isinstance(names, str) else list(names), list(known)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} must be some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def emulate(isa: str) -> None:
    """Start this program again under the variables of an instruction set, unless they are in force."""
    if isa not in ISA_VARIABLES:
        raise typer.BadParameter(f"--isa must be one of {list(ISA_VARIABLES)}, got {isa!r}")
    if any(os.environ.get(name) != value for name, value in ISA_VARIABLES[isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ISA_VARIABLES[isa]})


def keep_compiled_buffers() -> None:
    """Have compiled graphs keep what their backward reads, or it could not be timed by itself."""
    from torch._functorch import config

    config.donated_buffer = False


def own_inductor_cache() -> None:
    """Have Inductor use a new folder, which goes when the program ends.

    Code that it kept from a run under another instruction set has crashed this one.
    """
    folder = tempfile.TemporaryDirectory(prefix="petl_kernels_inductor_")
    atexit.register(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
