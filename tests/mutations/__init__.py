"""Kernels broken on purpose, to see that the tests notice: `make mutations`.

A table per kernel (`cpp/`, `triton/`, `cuda/`) says what is broken and which tests are the kernel's; `results.json`
says which of them noticed, and from it comes the table of `tests/README.md`.
"""
