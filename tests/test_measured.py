"""What "auto" takes on a GPU: a made-up crossover table, read by the calls of ops that believe they are on one."""

from __future__ import annotations

import csv

import pytest
import torch
from table import inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from petl_kernels import bottleneck_adapter, explain, layer_norm
from petl_kernels.ops import _measured
from petl_kernels.ops._op import Op
from petl_kernels.testing import CASES, arguments

H100, L4 = ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA L4", "8.9")
ADAPTER = (*H100, "bottleneck_adapter", "bfloat16")
ROWS = [
    (*ADAPTER, "512x768x64", "", "triton"),
    (*ADAPTER, "4096x768x64", "cuda triton", "cuda triton"),
    (*ADAPTER, "16384x768x64", "cuda", "triton cuda"),
    (*ADAPTER, "4096x4096x64", "triton", ""),
    (*ADAPTER, "4096x768x8", "", "cuda"),
    (*H100, "layer_norm", "float32", "4096x768", "triton", ""),
]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The table above in a file of its own, and a function that says which GPU this is."""
    path = tmp_path / "crossover.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([_measured.COLUMNS, *ROWS])
    monkeypatch.setattr(_measured, "PATH", path)
    monkeypatch.delenv("PETL_KERNELS_IMPL", raising=False)
    here = [H100]
    monkeypatch.setattr(_measured, "device_of", lambda index: here[0])
    caches = (_measured.table, _measured._rows, _measured.eager, _measured.compiled)

    def become(device):
        here[0] = device
        for cached in caches:
            cached.cache_clear()

    become(H100)
    yield become
    for cached in caches:
        cached.cache_clear()


def found(n, d, r, dtype=torch.bfloat16):
    return _measured.eager("bottleneck_adapter", 0, dtype, (n, d, r))


def test_the_nearest_shape_decides(measured):
    assert found(4096, 768, 64).impls == ("cuda", "triton")
    assert found(3000, 800, 50).impls == ("cuda", "triton")
    assert found(1000, 768, 64).impls == ()  # nearer to 512
    assert found(4096, 768, 16).impls == ()  # nearer to r = 8
    assert found(4096, 2048, 64).impls == ("triton",)
    assert found(4096, 768, 64, torch.float16) == found(4096, 768, 64)
    assert found(4096, 768, 64).source == "measured on NVIDIA H100 80GB HBM3 at 4096x768x64 in bfloat16"


def test_more_rows_than_measured_are_as_the_most(measured):
    assert found(1_000_000, 768, 64).impls == ("cuda",)


def test_far_from_what_was_measured_nothing_is_known(measured):
    for shape in ((64, 768, 64), (4096, 64, 64), (4096, 768, 1), (0, 768, 64)):
        said = found(*shape)
        assert said.impls == () and "over 4 times off" in said.source
    assert found(4096, 768, 64, torch.float32) == (
        (),
        f"bottleneck_adapter in float32 is not measured on {H100[0]} (9.0)",
    )


def test_another_device_of_the_same_capability_counts_and_others_do_not(measured):
    measured(("NVIDIA H100 PCIe", "9.0"))
    assert found(4096, 768, 64).impls == ("cuda", "triton")
    measured(L4)
    assert found(4096, 768, 64) == ((), "bottleneck_adapter in bfloat16 is not measured on NVIDIA L4 (8.9)")


def on_gpu(dtype, n=4096, d=768, r=64, **options):
    """A call whose tensors say that they are on a GPU, and have no memory."""
    with FakeTensorMode():
        x, down, up = (torch.empty(s, dtype=dtype, device="cuda:0") for s in ((n, d), (r, d), (d, r)))
    return dict(x=x, w_down=down, b_down=None, w_up=up, b_up=None, residual=x, **options)


def test_explain_names_the_measurement(measured, monkeypatch):
    monkeypatch.setattr(Op, "unsupported", lambda self, impl, *call: "no nvcc" if impl == "cuda" else None)
    said = explain(bottleneck_adapter, **on_gpu(torch.bfloat16))
    assert said.chosen == "triton"  # the second best, since the best is not there
    assert said.why == f"known to be the fastest here ({found(4096, 768, 64).source})"
    assert said.others["cuda"] == "no nvcc"
    said = explain(bottleneck_adapter, **on_gpu(torch.float32))
    assert said.chosen == "reference"
    assert said.why.startswith("nothing is known to be faster here (bottleneck_adapter in float32 is not measured on")
    assert f"runs on 'reference': {said.why}\n" in str(said)


def test_no_gpu_is_in_the_table_that_is_shipped_unless_it_was_measured():
    """Every row names an op, implementations that it has, and as many sizes as it has."""
    known = {case.name: case for case in CASES}
    for row in _measured.table():
        case = known[row.op]
        sizes = case.op.sizes(*case.op.prepare(**arguments(case.inputs(case.host))))
        assert len(row.sizes) == len(sizes)
        assert {*row.eager, *row.compiled} <= {*case.op.impls} - {"reference", "cpp"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_are_those_of_the_call(case):
    """Every op of the table has them, the rows first; a sample's own sizes are among them."""
    sample = dict(case.host, n=12)
    sizes = case.op.sizes(*case.op.prepare(**arguments(case.inputs(sample))))
    assert sizes[0] == 12
    wanted = {value for key, value in sample.items() if type(value) is int and key in ("d", "r", "k", "tasks")}
    assert wanted <= set(sizes[1:])


@pytest.fixture
def believed(measured, monkeypatch):
    """The CPU is taken for the GPU of the table: what it chooses really runs, in the interpreter."""
    monkeypatch.setattr(_measured, "GPU", "cpu")
    real = Op.unsupported
    monkeypatch.setattr(
        Op, "unsupported", lambda self, impl, *call: "not here" if impl == "cuda" else real(self, impl, *call)
    )


def test_auto_runs_what_the_table_says(believed):
    if "triton" not in Op.registry["layer_norm"].impls:
        pytest.skip("no Triton")
    x = torch.randn(4096, 768)
    assert explain(layer_norm, x, None, None).chosen == "triton"
    assert explain(layer_norm, x.double(), None, None).chosen == "reference"  # never measured in float64


def test_a_compiled_graph_takes_what_won_at_every_number_of_rows(measured):
    def names(*widths):
        return _measured.compiled("bottleneck_adapter", 0, torch.bfloat16, widths).impls

    assert names(768, 64) == ("triton",)  # which "cuda", at 512 rows not among the winners, was not
    assert names(4096, 64) == () and names(768, 8) == ("cuda",) and names(64, 64) == ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_compiled_call_reads_widths_and_not_rows(case, believed, monkeypatch):
    asked = []
    real = _measured.compiled
    monkeypatch.setattr(_measured, "compiled", lambda *args: asked.append(args[3]) or real(*args))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fn = torch.compile(case.fn, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for n in (7, 9, 13):
        call = arguments(inputs(case, "reference", n=n, gate=None, dropout=0.0))
        torch.testing.assert_close(fn(**call), case.fn(**call, impl="reference"))
        frames.add(counter.frame_count)
    assert len(frames) == 1 and asked  # one compilation serves every number of rows
    assert set(asked) == {case.op.sizes(*case.op.prepare(**call))[1:]}
