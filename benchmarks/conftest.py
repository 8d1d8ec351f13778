"""`pytest benchmarks --benchmark-only` measures, although pyproject.toml disables benchmarks among the tests."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False
