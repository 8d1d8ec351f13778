"""The command line, `petl-kernels`."""

import typer

from petl_kernels.cli.bench import bench
from petl_kernels.cli.env import env
from petl_kernels.cli.methods import methods
from petl_kernels.cli.profile import profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Compiled kernels for PETL: what runs here, and why.",
)
app.command()(env)
app.command()(methods)
app.command()(profile)
app.command()(bench)

__all__ = ["app"]
