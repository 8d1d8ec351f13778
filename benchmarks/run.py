"""Time the ops of `petl_kernels.testing.CASES`: `python benchmarks/run.py --csv out.csv`.

That is `petl-kernels bench`, which writes here only what it is asked for. `--suite gpu` is the whole programme of a GPU
(benchmarks/gpu).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from petl_kernels.benchmarking.options import emulate, keep_compiled_buffers, own_inductor_cache
from petl_kernels.benchmarking.provenance import ISA_VARIABLES
from petl_kernels.cli.bench import bench

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main(
    op: Annotated[str | None, typer.Option(help="Ops, comma-separated; all of them otherwise.")] = None,
    impl: Annotated[
        str | None, typer.Option(help="Implementations, comma-separated; all that run here otherwise.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Some of forward (no grad), backward, full (both), host.")
    ] = "forward,full,host",
    dtype: Annotated[str, typer.Option(help="As of `petl-kernels bench`.")] = "float32,bfloat16",
    shape: Annotated[list[str] | None, typer.Option(help="As 4096x768x64; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per shape, dtype and mode.")] = 3.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    compile: Annotated[bool, typer.Option(help="Time torch.compile of the reference too.")] = True,
    isa: Annotated[str | None, typer.Option(help=f"Emulate a machine with {' or '.join(ISA_VARIABLES)} only.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="gpu: all ops, and training steps, on one GPU in --minutes.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="What the suite may take.")] = 7.5,
    rehearse: Annotated[
        bool, typer.Option(help="Run the suite in tiny sizes on the CPU; its figures say nothing.")
    ] = False,
) -> None:
    """Check, then time eager, torch.compile and every implementation in interleaved rounds."""
    if suite is None:
        ops = op.split(",") if op else None
        bench(
            ops,
            impl,
            mode=mode,
            dtype=dtype,
            shape=shape,
            compile=compile,
            device=device,
            threads=threads,
            isa=isa,
            seconds=seconds,
            repeats=repeats,
            out=None,
            csv=csv,
        )
    if suite != "gpu":
        raise typer.BadParameter(f"--suite must be gpu, got {suite!r}")
    from gpu.run import run_suite

    if isa is not None:
        emulate(isa)
    own_inductor_cache()
    keep_compiled_buffers()
    torch.set_num_threads(threads or torch.get_num_threads())
    raise typer.Exit(run_suite(console, minutes, op, impl, compile, rehearse, csv))


if __name__ == "__main__":
    typer.run(main)
