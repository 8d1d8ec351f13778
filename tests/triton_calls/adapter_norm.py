"""The launch settings of `adapter_norm`: held or not, narrow and wide bottlenecks; at d = 768 both forms and norms.

The second launch of the backward is `bottleneck_adapter`'s kernel, compiled with its own settings. bf16 stands for
fp16, which has its width, and plain fp32, which takes more registers, for tf32.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from petl_kernels.ops.adapter_norm import triton as implementation

KERNELS = 3


class _Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    yield "ieee"
    _call(768, 64, bf16, bf16, True)
    _call(768, 64, bf16, bf16, False)
    for d, r, dtype in ((768, 64, bf16), (768, 128, fp32)):
        yield "ieee"
        _call(d, r, dtype, fp32, False)


def others() -> Iterator[str]:
    """Rows that are held forward only, with a narrow and the widest bottleneck, and wide float32 ones."""
    for d, r, dtype in ((1024, 64, torch.bfloat16), (1024, 128, torch.bfloat16), (1024, 64, torch.float32)):
        yield "ieee"
        _call(d, r, dtype, torch.float32, False)


def _call(d: int, r: int, dtype: torch.dtype, parameters: torch.dtype, parallel_rms: bool) -> None:
    implementation.bottleneck = SimpleNamespace(
        _slab_settings=implementation.bottleneck._slab_settings,
        _row_groups=implementation.bottleneck._row_groups,
        kernels=SimpleNamespace(_bottleneck_adapter_bwd_slab_kernel=_Nothing()),
    )
    n = 1 << 14
    x, z, rstd = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype), torch.empty(n)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up = torch.empty(r, dtype=parameters), torch.empty(d, dtype=parameters)
    weights = (w_down, b_down, w_up, b_up)
    hidden, norm = (torch.empty_like(x), "rms") if parallel_rms else (None, "layer")
    ln = (None, None) if parallel_rms else (b_up, b_up)
    implementation.forward(x, x, hidden, *weights, *ln, b_up, 1.0, "gelu", norm, 1e-5, True, False)
    mean = rstd[:0] if parallel_rms else rstd
    needs = (True,) * 6 + (not parallel_rms,) * 2 + (True,)
    implementation.backward(
        x, x, x, hidden, z, mean, rstd, z[:0], *weights, *ln, b_up, 1.0, "gelu", norm, hidden is None, needs
    )
