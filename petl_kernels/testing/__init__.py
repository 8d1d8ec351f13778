"""The one table that drives tests and benchmarks.

A case names a public op, the calls to test it with and the shapes to time it at. `tests/test_ops.py` and
`petl-kernels bench` read `CASES` and contain no op's name: adding an op adds its module here and one entry.
"""

from petl_kernels.testing import (
    adapter_bank,
    adapter_norm,
    bottleneck_adapter,
    channel_adapter,
    channel_importance,
    channel_linear,
    channel_scale,
    layer_norm,
    norm_adapter,
)
from petl_kernels.testing._case import (
    DRAWS,
    Case,
    Error,
    Inputs,
    Outcome,
    arguments,
    check,
    check_draws,
    errors,
    in_float64,
    judge,
    judge_draws,
    lay_out,
    mean_errors,
    run,
)

CASES = [
    bottleneck_adapter.CASE,
    adapter_bank.CASE,
    channel_adapter.CASE,
    channel_importance.CASE,
    channel_linear.CASE,
    channel_scale.CASE,
    layer_norm.CASE,
    adapter_norm.CASE,
    norm_adapter.CASE,
]

__all__ = [
    "CASES",
    "DRAWS",
    "Case",
    "Error",
    "Inputs",
    "Outcome",
    "arguments",
    "check",
    "check_draws",
    "errors",
    "in_float64",
    "judge",
    "judge_draws",
    "lay_out",
    "mean_errors",
    "run",
]
