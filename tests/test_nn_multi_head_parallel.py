"""`petl_kernels.nn.MultiHeadParallelAdapter`: the formula head by head, few launches, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from petl_kernels import bottleneck_adapter
from petl_kernels.nn import MultiHeadParallelAdapter
from petl_kernels.profiling import count_launches
from petl_kernels.testing import Outcome, judge

D, HEADS, R, B = 48, 4, 5, 2
D_HEAD = D // HEADS


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64, trained_projection=False, tokens=7):
    projection = nn.Linear(D, D, dtype=dtype).requires_grad_(trained_projection)
    with torch.no_grad():
        projection.weight.copy_(random(D, D, seed=2) * D**-0.5)
        projection.bias.copy_(random(D, seed=3) * 0.2)
    return random(B, tokens, D, seed=1, dtype=dtype).requires_grad_(), projection


def trained(dtype=torch.float64, **options):
    """A module whose parameters are far from where they start."""
    module = MultiHeadParallelAdapter(D, HEADS, R, dtype=dtype, **options)
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=10 + seed) * 0.4 + 0.2)
    return module


def formula(module, x, projection, drop=lambda hidden: hidden):
    """Head by head, from the parameters alone."""
    p = dict(module.named_parameters())
    query = projection(F.layer_norm(x, (D,), p["norm.weight"], p["norm.bias"]))
    added = []
    for head, q in enumerate(query.split(D_HEAD, -1)):
        added.append(drop(torch.relu(q @ p["key"][head].T)) @ p["value"][head])
    return module.scale * torch.cat(added, -1)


def outcome(module, output, x, projection):
    own = [(f"own.{name}", p) for name, p in module.named_parameters()]
    other = [(f"projection.{name}", p) for name, p in projection.named_parameters()]
    wanted = {name: t for name, t in [("x", x), *own, *other] if t.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), random(*output.shape, seed=9, dtype=output.dtype))
    return Outcome(output.detach(), dict(zip(wanted, grads)))


@pytest.mark.parametrize("trained_projection", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_forward_and_gradients_are_the_formula(scale, trained_projection):
    module, (x, projection) = trained(scale=scale), inputs(trained_projection=trained_projection)
    expected = outcome(module, formula(module, x, projection), x, projection)
    assert not judge(outcome(module, module(x, projection), x, projection), expected, expected)
    assert len(expected.grads) == (7 if trained_projection else 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rounding(scale, dtype):
    module, (x, projection) = trained(dtype, scale=scale), inputs(dtype, trained_projection=True, tokens=60)
    exact, exact_projection = (copy.deepcopy(m).double() for m in (module, projection))
    exact_x = x.detach().double().requires_grad_()
    ours = outcome(module, module(x, projection), x, projection)
    eager = outcome(module, formula(module, x, projection), x, projection)
    true = outcome(exact, formula(exact, exact_x, exact_projection), exact_x, exact_projection)
    assert not judge(ours, eager, true)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, 4, D), (0, 5, D)])
def test_any_number_of_dimensions(shape):
    module, (_, projection) = trained(), inputs()
    x = random(*shape)
    assert module(x, projection).shape == shape
    torch.testing.assert_close(module(x, projection), formula(module, x, projection), rtol=0, atol=1e-13)


def test_the_projection_is_any_callable_and_stays_out_of_the_module():
    module, (x, projection) = trained(), inputs()
    assert torch.equal(module(x, lambda t: F.linear(t, projection.weight, projection.bias)), module(x, projection))
    assert set(module.state_dict()) == {"norm.weight", "norm.bias", "key", "value"}


@pytest.mark.parametrize("heads", [4, 16])
def test_launches_do_not_grow_with_the_heads(heads):
    """As the docstring has it; a call of the op for every head takes more, and gives the same."""
    module, projection = MultiHeadParallelAdapter(64, heads, 3), nn.Linear(64, 64).requires_grad_(False)
    x, g = random(2, 5, 64, dtype=torch.float32).requires_grad_(), random(2, 5, 64, seed=1, dtype=torch.float32)

    def by_head():
        queries = projection(module.norm(x)).split(64 // heads, -1)
        weights = zip(module.key, (p.T for p in module.value))
        calls = ((q, down, None, up, None) for q, (down, up) in zip(queries, weights))
        return torch.cat([bottleneck_adapter(*call, activation="relu") for call in calls], -1)

    torch.testing.assert_close(by_head(), module(x, projection))
    with torch.no_grad():
        assert count_launches(lambda: module(x, projection)).total() == 6
        assert count_launches(by_head).total() == heads + 3
    assert count_launches(lambda: module(x, projection).backward(g)).total() == 15
    assert count_launches(lambda: by_head().backward(g)).total() >= 2 * heads + 13


def test_dropout_only_in_training():
    module, (x, projection) = trained(dropout=0.4), inputs()
    torch.manual_seed(5)
    kept = F.dropout(torch.ones(HEADS, B * 7, R, dtype=torch.float64), 0.4)
    masks = iter(kept.unflatten(1, (B, 7)))
    torch.manual_seed(5)
    got = outcome(module, module(x, projection), x, projection)
    expected = outcome(module, formula(module, x, projection, lambda h: h * next(masks)), x, projection)
    assert not judge(got, expected, expected)
    module.eval()
    torch.testing.assert_close(module(x, projection), formula(module, x, projection), rtol=0, atol=1e-13)


@pytest.mark.parametrize("frozen", ["norm", "key", "value", ""])
def test_frozen_subsets(frozen):
    module, (x, projection) = trained(), inputs()
    every = outcome(module, module(x, projection), x, projection).grads
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    some = outcome(module, module(x, projection), x, projection).grads
    assert len(some) < len(every)
    for name, grad in some.items():
        torch.testing.assert_close(grad, every[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("r", [30, 200])
def test_parameter_counts_on_bart_large(r):
    """One per attention of BART-large; without the layer norms as many as a prefix of length r (14,745,600 at 200)."""
    modules = nn.ModuleList(MultiHeadParallelAdapter(1024, 16, r, device="meta") for _ in range(36))
    total = sum(p.numel() for p in modules.parameters() if p.requires_grad)
    norms = sum(p.numel() for m in modules for p in m.norm.parameters())
    assert total == 36 * (2 * r * 1024 + 2 * 1024) and total - norms == {30: 2_211_840, 200: 14_745_600}[r]
    assert {tuple(p.shape) for p in modules[0].parameters()} == {(1024,), (16, r, 64)}


def test_starts_as_he_et_al_do():
    torch.manual_seed(0)
    module = MultiHeadParallelAdapter(768, 12, 200)
    for p in (module.key, module.value):
        assert p.std().item() == pytest.approx(0.02, rel=0.02) and p.abs().max() > 0.06
    assert torch.equal(module.norm.weight, torch.ones(768)) and torch.count_nonzero(module.norm.bias) == 0


def test_lora_init_starts_as_zero_and_trains():
    module = MultiHeadParallelAdapter(768, 12, 200, init="lora")
    bound = 64**-0.5  # Kaiming uniform with a = sqrt 5 and the 64 inputs of a head
    assert module.key.abs().max() <= bound and module.key.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    output = module(random(2, 3, 768, dtype=torch.float32), nn.Linear(768, 768))
    assert torch.count_nonzero(output) == 0
    output.sum().backward()
    assert module.value.grad.abs().sum() > 0


@pytest.mark.parametrize("init", ["bert", "lora"])
def test_reset_and_meta_construction(init):
    torch.manual_seed(3)
    expected = MultiHeadParallelAdapter(D, HEADS, R, init=init)
    deferred = MultiHeadParallelAdapter(D, HEADS, R, init=init, device="meta")
    assert all(p.is_meta for p in deferred.parameters())
    assert deferred(torch.empty(B, 3, D, device="meta"), nn.Linear(D, D, device="meta")).shape == (B, 3, D)
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, p), (_, q) in zip(expected.named_parameters(), deferred.named_parameters()):
        assert torch.equal(p, q), name


def test_copies(tmp_path):
    module, (x, projection) = trained(scale=0.3), inputs()
    expected = module(x, projection)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded, from_file = (MultiHeadParallelAdapter(D, HEADS, R, scale=0.3, dtype=torch.float64) for _ in range(2))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    save_model(module, tmp_path / "adapter.safetensors")
    load_model(from_file, tmp_path / "adapter.safetensors")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, from_file):
        assert torch.equal(other(x, projection), expected)
        assert other.key.data_ptr() != module.key.data_ptr()
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in module.named_parameters()]


def test_float32_masters_and_autocast():
    module, (x, projection) = trained(torch.float32), inputs(torch.bfloat16)
    output = module(x, projection)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and {p.grad.dtype for p in module.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert module(*inputs(torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_compiled_whole(scale):
    torch._dynamo.reset()
    module, (x, projection) = trained(scale=scale), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = outcome(module, module(x, projection), x, projection)
    assert not judge(outcome(module, compiled(x, projection), x, projection), expected, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, dropout):
    module, (x, projection) = trained(dropout=dropout), inputs()
    results = []
    for call in (module, lambda *args: checkpoint(module, *args, use_reentrant=reentrant)):
        torch.manual_seed(1)
        module.zero_grad()
        x.grad = None
        output = call(x, projection)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_repr_is_its_construction():
    for options in ({}, dict(scale=0.3, dropout=0.1, init="lora")):
        module = MultiHeadParallelAdapter(D, HEADS, R, **options)
        again = eval(f"MultiHeadParallelAdapter({module.extra_repr()})")
        assert repr(again) == repr(module) and module.extra_repr() in repr(module)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=0), "d_model must be an integer of at least 1, got 0"),
        (dict(heads=2.0), r"heads must be an integer of at least 1, got 2\.0"),
        (dict(heads=5), "heads must divide d_model = 48, got 5"),
        (dict(bottleneck=-1), "bottleneck must be an integer of at least 1, got -1"),
        (dict(scale="learned"), "scale must be a float, got 'learned'"),
        (dict(scale=True), "scale must be a float, got True"),
        (dict(dropout=1), r"dropout must be a probability in \[0, 1\), got 1"),
        (dict(init="houlsby"), r"init must be one of \('bert', 'lora'\), got 'houlsby'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"^MultiHeadParallelAdapter: {message}"):
        MultiHeadParallelAdapter(**{"d_model": D, "heads": HEADS, "bottleneck": R, **bad})


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(x=random(B, 7, D + 1)), ValueError, r"x must be \[\.\.\., d_model\] = \[\.\.\., 48\], got \[2, 7, 49\]"),
        (dict(x=torch.tensor(1.0).double()), ValueError, r"x must be .* got \[\]"),
        (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
        (dict(x=random(B, 7, D).float()), TypeError, r"x is torch\.float32 beside the adapter of torch\.float64"),
        (dict(x=torch.empty(B, 7, D, device="meta")), ValueError, "x must be on the adapter's device cpu, got meta"),
        (dict(q_proj=random(D, D)), TypeError, "q_proj must be callable, got Tensor"),
        (dict(q_proj=lambda x: x[..., :6]), ValueError, r"q_proj must give x's shape \[2, 7, 48\], got \[2, 7, 6\]"),
    ],
)
def test_bad_calls(bad, error, message):
    x, projection = inputs()
    with pytest.raises(error, match=f"^MultiHeadParallelAdapter: {message}"):
        trained()(**{"x": x, "q_proj": projection, **bad})
