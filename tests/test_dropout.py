"""Dropout of `bottleneck_adapter`: the same elements in every implementation, drawn anew or again as torch's are."""

from __future__ import annotations

import pytest
import torch
from table import impls, setting
from torch.utils.checkpoint import checkpoint

from petl_kernels import bottleneck_adapter
from petl_kernels.nn import AdaptFormer
from petl_kernels.ops._dropout import keep, new_seed, philox
from petl_kernels.testing import CASES

KERNELS = [i for i in impls(next(case for case in CASES if case.name == "bottleneck_adapter")) if i != "reference"]
CPU = torch.device("cpu")


def dropped(n, r, p, seed=None, impl=None, dtype=torch.float32):
    """Dropout and nothing else of ones [n, r]: where it is not zero, the element was kept."""
    x, eye = torch.ones(n, r, dtype=dtype), torch.eye(r, dtype=dtype)
    return bottleneck_adapter(x, eye, None, eye, None, activation="identity", dropout=p, seed=seed, impl=impl)


def compiled(fn, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    # Known answers of the authors' library.
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_philox(counter, key, words):
    got = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("impl", KERNELS)
def test_every_implementation_drops_the_same(impl):
    for seed in (0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF):
        given = torch.tensor([seed])
        for n, r, p in ((1, 1, 0.5), (3, 37, 0.1), (67, 16, 0.9), (130, 5, 1e-9)):
            expected = keep(given, n, r, p) / (1 - p)
            torch.testing.assert_close(dropped(n, r, p, given, impl), expected.float(), rtol=1e-6, atol=0)
            torch.testing.assert_close(dropped(n, r, p, given, "reference"), expected.float(), rtol=1e-6, atol=0)


def test_every_instruction_set_drops_the_same():
    from petl_kernels import _cpu

    seed = torch.tensor([3])
    for isa in _cpu.isas():
        with setting(isa):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                assert torch.equal(dropped(131, 70, 0.3, seed, "cpp", dtype) != 0, keep(seed, 131, 70, 0.3))


def test_the_number_of_threads_does_not_matter():
    seed, results = torch.tensor([3]), []
    for count in (1, 2, 5):
        with setting(threads=count):
            results.append(dropped(3000, 64, 0.3, seed, "cpp"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_statistics(p):
    n, r = 4096, 64
    kept, other = (keep(torch.tensor([seed]), n, r, p).double() for seed in (1, 2))
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / (n * r) ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation / n**0.5  # of each column
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation / r**0.5  # and row
    centred, again = (kept - 1 + p) / deviation, (other - 1 + p) / deviation
    for a, b in (
        (centred[1:], centred[:-1]),
        (centred[4:], centred[:-4]),
        (centred[:, 1:], centred[:, :-1]),
        (centred, again),
    ):
        assert abs((a * b).mean()) < 5 / (n * r) ** 0.5


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
def test_without_a_seed_torch_draws(impl):
    torch.manual_seed(11)
    first, second = (dropped(40, 16, 0.5, impl=impl) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(dropped(40, 16, 0.5, impl=impl), first)
    assert torch.equal(dropped(40, 16, 0.5, impl=impl), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(dropped(40, 16, 0.0, impl=impl), torch.ones(40, 16))
    assert torch.equal(torch.get_rng_state(), state)  # nothing to drop, nothing drawn


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_draws_again_what_the_forward_drew(reentrant):
    module = AdaptFormer(48, 8, impl="cpp", dropout=0.5, init="bert", dtype=torch.float64)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    torch.manual_seed(1)
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_no_mask_is_saved():
    def saved(p):
        sizes = []
        module = AdaptFormer(48, 8, impl="cpp", dropout=p)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            module(torch.randn(100, 48), torch.randn(100, 48))
        return sum(sizes)

    assert saved(0.5) == saved(0.0) + 8  # the seed


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_draws_anew(backend):
    module = compiled(AdaptFormer(48, 8, impl="cpp", dropout=0.5, init="bert"), backend=backend)
    x = torch.randn(5, 48)
    torch.manual_seed(2)
    first, second = module(x), module(x)
    torch.manual_seed(2)
    assert torch.equal(module(x), first) and torch.equal(module(x), second) and not torch.equal(first, second)
    module(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_a_seed_is_read_where_the_kernel_runs():
    """So that a captured graph, or a compiled one, draws anew when the value changes."""
    seed = new_seed(CPU)
    fn = compiled(lambda s: dropped(40, 16, 0.5, s, "cpp"))
    before, kept = fn(seed), keep(seed, 40, 16, 0.5)
    assert torch.equal(before != 0, kept)
    seed += 1
    assert torch.equal(fn(seed) != 0, keep(seed, 40, 16, 0.5)) and not torch.equal(fn(seed), before)
