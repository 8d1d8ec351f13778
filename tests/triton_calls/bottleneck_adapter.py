"""Every launch setting of `bottleneck_adapter`: forward with x, with another and without residual, and the backward.

bf16 stands for fp16, which has its width. bf16 beside fp32 parameters takes more of everything than bf16 alone, and
plain fp32 more registers than tf32: the lighter ones are compiled at full tiles of r = 64 only. Where tiles are less
than full, and of activations, the heaviest stand for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from petl_kernels.ops.bottleneck_adapter import triton as implementation

KERNELS = 4


_BF16, _FP32 = torch.bfloat16, torch.float32
_FULL = 1 << 16

# (activation, (n, d, r), dtype, parameters' dtype, float32 precision)
_Setting = tuple[str, tuple[int, int, int], torch.dtype, torch.dtype, str]


def calls() -> Iterator[str]:
    """Make each call after yielding the float32 precision it is made in."""
    yield from _each(_plain(16, 64, 512))
    yield from _each(
        [
            ("gelu", (5000, 1024, 64), _BF16, _FP32, "ieee"),
            ("gelu", (512, 1024, 64), _BF16, _FP32, "ieee"),
            ("gelu", (512, 1024, 64), _FP32, _FP32, "ieee"),
            ("gelu", (_FULL, 768, 64), _BF16, _BF16, "ieee"),
            ("gelu", (_FULL, 512, 64), _FP32, _FP32, "tf32"),
            ("gelu_tanh", (_FULL, 768, 64), _BF16, _FP32, "ieee"),
            ("gelu", (_FULL, 8192, 64), _BF16, _FP32, "ieee"),
            ("gelu", (1000, 1000, 100), _BF16, _FP32, "ieee"),
            *_softmax(64),
        ]
    )
    yield from _modified("gelu", 1024, 64, _BF16, dropout=True)
    yield from _modified("softmax", 768, 64, _BF16, dropout=False)


def others() -> Iterator[str]:
    """Bottlenecks between those, and the widest where it takes what r = 64 takes and longer to compile."""
    yield from _each(_plain(32, 128, 256))
    yield from _each(
        [
            ("gelu", (5000, 1024, 512), _BF16, _FP32, "ieee"),
            ("gelu", (512, 1024, 512), _BF16, _FP32, "ieee"),
            ("gelu", (512, 1024, 512), _FP32, _FP32, "ieee"),
            *_softmax(512),
        ]
    )
    yield from _modified("softmax", 768, 512, _BF16, dropout=False)
    yield from _modified("softmax", 512, 32, _FP32, dropout=False)


def _plain(*ranks: int) -> Iterator[_Setting]:
    for r in ranks:
        yield "gelu", (_FULL, 768, r), _BF16, _FP32, "ieee"
        yield "gelu", (_FULL, 512, r), _FP32, _FP32, "ieee"


def _softmax(r: int) -> Iterator[_Setting]:
    """Softmax stands for dropout and gate too, which the others go without."""
    yield "softmax", (_FULL, 768, r), _BF16, _FP32, "ieee"
    yield "softmax", (_FULL, 512, r), _FP32, _FP32, "ieee"


def _each(settings: Iterable[_Setting]) -> Iterator[str]:
    for activation, size, dtype, parameters, precision in settings:
        yield precision
        everything = activation == "softmax"
        _call(activation, size, dtype, parameters, gate=everything, dropout=everything)


def _modified(activation: str, d: int, r: int, dtype: torch.dtype, dropout: bool) -> Iterator[str]:
    """One modification less can take more registers than all three: with larger tiles some of these spill where those
    with everything do not.
    """
    yield "ieee"
    _call(activation, (_FULL, d, r), dtype, _FP32, gate=True, dropout=dropout)


def _call(
    activation: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    parameters: torch.dtype,
    gate: bool,
    dropout: bool,
) -> None:
    n, d, r = size
    x, z = torch.empty(n, d, dtype=dtype), torch.empty(n, r, dtype=dtype)
    w_down, w_up = torch.empty(r, d, dtype=parameters), torch.empty(d, r, dtype=parameters)
    b_down, b_up, scale = (torch.empty(k, dtype=parameters) for k in (r, d, d))
    weights = (w_down, b_down, w_up, b_up)
    factors = torch.empty(n, 1, dtype=parameters) if gate else None
    seed = torch.empty(1, dtype=torch.int64) if dropout else None
    options = (factors, seed, 0.1 if dropout else 0.0)
    implementation.forward(x, *weights, x, scale, *options, 1.0, activation, True)
    if not gate:
        implementation.forward(x, *weights, torch.empty_like(x), None, *options, 2.0, activation, True)
    implementation.backward(x, x, z, *weights, scale, *options, 1.0, activation, True, (*(True,) * 6, gate))
