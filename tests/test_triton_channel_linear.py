"""The Triton kernels of `channel_linear` without a GPU: launches, bytes, determinism, wide strides, every tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import petl_kernels
from petl_kernels.testing import CASES, check
from petl_kernels.testing._case import Outcome, judge

pytest.importorskip("triton")

from triton_calls import channel_linear as calls
from triton_interpreter import count_bytes, count_launches, far_apart, interpreted

from petl_kernels.ops import _triton
from petl_kernels.ops.channel_linear import triton as implementation

CASE = next(case for case in CASES if case.name == "channel_linear")
BOTH_DIMS = pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
H100 = _triton.Device(132, 32)


def arguments(
    dim: int, n: int, k: int, d: int, d_out: int | None = None, dtype=torch.float32, x_dtype=None, own=torch.float32
) -> list:
    """(g, x, channels, channel_weight, channel_bias, dim) of a backward; x as the op passes it."""
    generator = torch.Generator().manual_seed(0)
    d_out = d if d_out is None else d_out
    g = torch.randn(n, d_out, generator=generator).to(dtype)
    x = torch.randn(n, d, generator=generator).to(x_dtype or dtype)
    channels = torch.randperm(d if dim else d_out, generator=generator)[:k]
    weight = torch.empty((d_out, k) if dim else (k, d), dtype=own)
    return [g, x[:, channels] if dim else x, channels, weight, None if dim else torch.empty(k, dtype=own), dim]


def product(g: Tensor, x: Tensor, channels: Tensor, dim: int, dtype: torch.dtype) -> Outcome:
    """The same gradients by torch, in `dtype`, as float32 parameters take them."""
    g, x = (g if dim else g[:, channels]).to(dtype), x.to(dtype)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    return Outcome((g.t() @ x).to(own), {} if dim else {"channel_bias": g.sum(0).to(own)})


def judged(call: list) -> list[str]:
    """The failures of a backward against float64, beside torch's product in the operands' common dtype."""
    g, x, channels, *_, dim = call
    dweight, dbias = implementation.backward(*call, (True, dim == 0))
    ours = Outcome(dweight, {} if dim else {"channel_bias": dbias})
    common = g.dtype if g.dtype == x.dtype else torch.float32
    return judge(ours, product(g, x, channels, dim, common), product(g, x, channels, dim, torch.float64))


@interpreted
@pytest.mark.parametrize(
    ("dim", "n", "k", "needs", "launches"),
    [
        (0, 32, 16, (True, True), 1),
        (0, 600, 16, (True, True), 2),
        (1, 32, 16, (True, False), 1),
        (1, 600, 16, (True, False), 2),
        (0, 16, 16, (False, True), 1),
        (0, 600, 16, (False, True), 2),
        (0, 600, 16, (True, False), 2),
        (0, 0, 16, (True, True), 1),  # writes the zeros
        (0, 600, 0, (True, True), 0),
        (1, 600, 0, (True, False), 0),
        (0, 600, 16, (False, False), 0),
    ],
)
def test_launches(dim, n, k, needs, launches):
    g, x, *rest = arguments(dim, n, k, 96)
    x = torch.cat([x, x], 1)[:, : x.shape[1]]  # rows of another stride are no reason for a copy
    with count_launches() as counted:
        dweight, dbias = implementation.backward(g, x if needs[0] else None, *rest, needs)
    assert counted.total() == launches, counted
    assert dweight.shape == (rest[1].shape if needs[0] else (0,))
    assert dbias.shape == ((k,) if needs[1] else (0,))
    if n == 0:
        assert dweight.eq(0).all() and dbias.eq(0).all()


@interpreted
@BOTH_DIMS
def test_torch_computes_what_is_dense_and_nothing_else(dim):
    call = CASE.inputs(dict(n=600, d=96, k=16, columns=bool(dim)), torch.float32)
    call.pop("grad_layout")
    y = petl_kernels.channel_linear(**call, impl="triton")
    wanted = [v for v in call.values() if isinstance(v, Tensor) and v.requires_grad]
    g = torch.ones_like(y)
    with count_launches() as counted:
        torch.autograd.grad(y, wanted, g)
    assert counted["aten::mm"] == 1  # dx
    assert counted.total() == 3, counted


def requests(dim: int, n: int, k: int, d: int) -> dict[str, int]:
    """Bytes that a backward in 16 bits asks for: each operand once for each tile of the other's, and nothing else."""
    across, along, groups = implementation._plan(n, k, d, 0 if dim else d, 2, False, H100).grid
    size = k * d + (0 if dim else k)
    return dict(
        chosen=2 * n * k * along,
        dense=2 * n * d * across,
        channels=0 if dim else 8 * k * along * groups,
        partial=8 * groups * size if groups > 1 else 0,
        output=4 * size,
    )


@interpreted
@BOTH_DIMS
@pytest.mark.parametrize(("n", "k", "d"), [(1500, 96, 768), (128, 384, 3072)])
def test_bytes_requested(dim, n, k, d):
    call = arguments(dim, n, k, d, dtype=torch.float16)
    g, x, channels = call[:3]
    with count_bytes() as traffic:
        dweight, dbias = implementation.backward(*call, (True, dim == 0))
    expected = requests(dim, n, k, d)
    chosen, dense = (x, g) if dim else (g, x)
    assert traffic.within(chosen) == expected["chosen"]
    assert traffic.within(dense) == expected["dense"]
    assert traffic.within(channels) == expected["channels"]
    assert traffic.within(dweight, dbias) == expected["output"]
    assert traffic.total == sum(expected.values())


@BOTH_DIMS
@pytest.mark.parametrize(
    ("d", "bound"),
    # Beside one read of each operand and one write of the gradient. 768: x is read for 2 tiles of k, g for 6 of d, 2.4
    # together, and the 11 groups of rows that it takes to fill 132 processors leave partial sums, 0.9. 3072: 3 and 12
    # tiles of 128 x 256, the largest there are, 3.4, and the partial sums of 3 groups, 0.9.
    [(768, 3.3), (3072, 4.5)],
)
def test_bytes_over_the_ideal(dim, d, bound):
    n, k = 4096, d // 8
    asked = requests(dim, n, k, d)
    assert 1 <= sum(asked.values()) / (2 * n * (k + d) + asked["output"]) <= bound


@interpreted
@BOTH_DIMS
def test_rows_more_than_2_to_the_31_elements_apart(dim):
    g, x, *rest = arguments(dim, 3, 8, 32, dtype=torch.float16)
    near = implementation.backward(g, x, *rest, (True, dim == 0))
    far = implementation.backward(far_apart(g), x, *rest, (True, dim == 0))
    other = implementation.backward(g, far_apart(x), *rest, (True, dim == 0))
    assert near[0].ne(0).any()
    for a, b, c in zip(near, far, other):
        assert torch.equal(a, b) and torch.equal(a, c)


@interpreted
@BOTH_DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dim, dtype):
    call = arguments(dim, 600, 16, 96, dtype=dtype)
    assert implementation._plan(600, 16, 96, 0 if dim else 96, dtype.itemsize, False, H100).grid[2] > 2  # groups
    first, second = (implementation.backward(*call, (True, dim == 0)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@interpreted
@pytest.mark.parametrize(("dim", "dtype"), [(0, torch.bfloat16), (1, torch.float32)], ids=str)
def test_larger_than_the_table(dim, dtype):
    sample = dict(n=2300, d=1000, d_out=(400, 130)[dim], k=384, columns=bool(dim))
    assert check(CASE, CASE.inputs(sample, dtype, torch.float32), impl="triton") == []


@interpreted
@BOTH_DIMS
@pytest.mark.parametrize(
    ("of_g", "of_x"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_operands_of_two_dtypes(dim, of_g, of_x):
    assert judged(arguments(dim, 700, 40, 150, 90, of_g, of_x)) == []


@interpreted
@BOTH_DIMS
@pytest.mark.parametrize("tile", sorted({tile for tiles in implementation.TILES.values() for tile in tiles}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tile(dim, tile, dtype, monkeypatch):
    monkeypatch.setattr(implementation, "TILES", {2: (tile,), 4: (tile,)})
    monkeypatch.setattr(implementation, "_plan", implementation._plan.__wrapped__)  # past its cache
    assert judged(arguments(dim, 70, 150, 300, 270, dtype)) == []


@interpreted
def test_the_bias_alone_needs_no_x():
    g, _, *rest = arguments(0, 5000, 150, 16, 400)
    dweight, dbias = implementation.backward(g, None, *rest, (False, True))
    expected = g[:, rest[0]].double().sum(0)
    assert dweight.numel() == 0
    assert (dbias - expected).abs().max() <= 1e-6 * g.abs().sum(0).max()


@BOTH_DIMS
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_compiled_reaches_every_tile(dim, itemsize):
    reached = set()
    for n, k, d in calls.SIZES:
        settings = implementation._plan(n, k, d, 0 if dim else d, itemsize, False, H100).settings
        tile = settings["BLOCK_O"], settings["BLOCK_I"]
        reached.add(tile[::-1] if dim else tile)
    assert reached >= set(implementation.TILES[itemsize])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("size", [(96, 768), (384, 768), (384, 3072), (8, 768), (1376, 4096), (1, 16)])
def test_partial_sums_are_no_more_than_the_operands(size, itemsize):
    k, d = size
    for n in (1, 100, 1024, 4096, 12608, 65536):
        across, along, groups = implementation._plan(n, k, d, d, itemsize, False, H100).grid
        assert groups == 1 or 8 * k * d * groups <= 2 * n * (k + d) * 1.001  # where `least` is rounded down
        assert groups == 1 or across * along * groups <= H100.processors


def test_unsupported_calls_say_why():
    call = CASE.inputs(CASE.typical, torch.float64)
    call.pop("grad_layout")
    with pytest.raises(RuntimeError, match="float64"):
        petl_kernels.channel_linear(**call, impl="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    call = CASE.inputs(CASE.typical, torch.float32)
    call.pop("grad_layout")
    with pytest.raises(RuntimeError, match="on a GPU, got cpu"):
        petl_kernels.channel_linear(**call, impl="triton")
