"""The adapter's kernels for sm_90a from Python: which calls they take and, where there is such a GPU, what they return.

What they compute, csrc/tests/test_cuda_adapter_sm90.cpp shows on an emulated one.
"""

from __future__ import annotations

import re

import pytest
import torch

from petl_kernels import bottleneck_adapter, explain
from petl_kernels.testing import CASES, in_float64, judge, run

pytest.importorskip("petl_kernels.ops.bottleneck_adapter.cuda_sm90", exc_type=ImportError)
from petl_kernels.ops.bottleneck_adapter import cuda_sm90


def call(n=8, d_in=64, r=16, d_out=64, dtype=torch.bfloat16, residual=None, gate=None, p=0.0, activation="gelu"):
    x, w_down, w_up = torch.ones(n, d_in), torch.ones(r, d_in), torch.ones(d_out, r)
    return x.to(dtype), w_down, None, w_up, None, x.to(residual or dtype), 1.0, gate, None, p, activation


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dtype": torch.float32}, "one 16-bit dtype .* got torch.float32"),
        ({"residual": torch.float32}, "one 16-bit dtype .* got torch.bfloat16, torch.float32"),
        ({"r": 72}, "bottlenecks of up to 64 .* got r = 72"),
        ({"d_in": 1032, "d_out": 1032}, "rows of up to 1024, got .* d = 1032"),
        ({"r": 12}, "multiples of 8 .* got r = 12"),
        ({"d_in": 100, "d_out": 100}, "multiples of 8 .* d = 100"),
        ({"gate": torch.ones(8, 1)}, "does not compute a gate; impl='cuda' does"),
        ({"p": 0.1}, "does not compute dropout"),
        ({"activation": "softmax"}, "does not compute a softmax"),
    ],
)
def test_what_does_not_fit(changed, reason):
    assert cuda_sm90.unfit(*call()) is None
    found = cuda_sm90.unfit(*call(**changed))
    assert found is not None and re.search(reason, found), found


def test_explain_says_why_not():
    x, w_down, _, w_up, *_ = call()
    others = explain(bottleneck_adapter, x, w_down, None, w_up, None).others
    assert "tensors on a GPU" in others["cuda_sm90"]


@pytest.mark.parametrize("offset, copies", [(0, False), (8, False), (1, True)])
def test_rows_that_tma_cannot_take_are_copied(offset, copies):
    """Of a slice of a wider matrix: one that begins or steps off 16 bytes is copied, another not."""
    wide = torch.arange(4 * 80, dtype=torch.bfloat16).reshape(4, 80)
    rows = wide[:, offset : offset + 64]
    taken = cuda_sm90._on_16_bytes(rows)
    assert (taken is not rows) == copies and torch.equal(taken, rows) and taken.data_ptr() % 16 == 0
    narrow = torch.ones(4, 76, dtype=torch.bfloat16)[:, :64]  # rows 152 bytes apart
    assert cuda_sm90._on_16_bytes(narrow).is_contiguous()


# One tile and many, clusters of 1, 2, 6 and 8; what is added, scaled and frozen.
CALLS = [
    {"n": 1, "d": 8, "r": 8},
    {"n": 300, "d": 136, "r": 64, "residual": "other", "scale": ()},
    {"n": 4099, "d": 768, "r": 64, "activation": "silu", "parameter_dtype": torch.float32},
    {"n": 257, "d": 512, "d_out": 1024, "r": 40, "residual": None, "scale": ("d_out",)},
    {"n": 130, "d": 64, "r": 8, "frozen": ("x", "w_down", "b_down")},
]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no GPU of capability 9.0"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sample", CALLS, ids=lambda sample: f"{sample['n']}x{sample['d']}x{sample['r']}")
def test_on_a_gpu_it_is_right_and_always_the_same(sample, dtype):
    sample = dict(sample)
    inputs = CASES[0].inputs(sample, dtype, sample.pop("parameter_dtype", None), device="cuda")
    ours = run(bottleneck_adapter, inputs, impl="cuda_sm90")
    eager = run(bottleneck_adapter, inputs, impl="reference")
    assert not judge(ours, eager, run(bottleneck_adapter, in_float64(inputs), impl="reference"))
    for _ in range(5):
        again = run(bottleneck_adapter, inputs, impl="cuda_sm90")
        for (name, got), (_, before) in zip(again.items(), ours.items(), strict=True):
            assert torch.equal(got, before), name
