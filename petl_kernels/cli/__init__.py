"""The command line, `petl-kernels`."""

import typer

from petl_kernels.cli.env import env

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Compiled kernels for PETL: what runs here, and why."
)
app.command()(env)


@app.callback()
def _main() -> None:
    """Keep `env` a subcommand: typer folds a lone command into the program."""


__all__ = ["app"]
