"""`python -m petl_kernels`."""

from petl_kernels.cli import app

app()
