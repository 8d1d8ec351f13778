"""`petl_kernels.nn.PrefixAdapter`: attention with a trained prefix, joined or gated, and a module like any other."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch.utils.checkpoint import checkpoint

from petl_kernels.nn import PrefixAdapter
from petl_kernels.testing import Outcome, judge

D, HEADS, L, B = 48, 4, 5, 2
D_HEAD = D // HEADS
SIZES = [(6, 6), (5, 8), (8, 5), (1, 4)]
INF = math.inf


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(tokens, keys, dtype=torch.float64):
    q, k, v = (random(B, HEADS, n, D_HEAD, seed=s, dtype=dtype) for s, n in ((1, tokens), (2, keys), (3, keys)))
    return {"query": q.requires_grad_(), "key": k.requires_grad_(), "value": v.requires_grad_()}


def trained(dtype=torch.float64, **options):
    """A module whose prefix is far from where it starts, and large enough to matter beside the keys."""
    module = PrefixAdapter(D, HEADS, L, dtype=dtype, **{"reparametrization": None, **options})
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=10 + seed) * (0.6 if module.reparametrization is None else 0.4))
    return module


def masks(tokens, keys):
    """Masks of every kind and shape, with rows that see nothing."""
    seen, bias = random(B, HEADS, tokens, keys, seed=4) > -0.3, random(B, HEADS, tokens, keys, seed=5)
    seen[0, :, 0] = False
    nothing = torch.zeros(tokens, keys).bool()
    bools = dict(full=seen, rows=seen[0, 0], padding=seen[:, :1, -1:], queries=seen[..., :1], nothing=nothing)
    return bools | dict(bias=bias, relative=bias[0], inf=bias.masked_fill(~seen, -INF), one=bias[..., :1])


def prefix_of(module):
    """P_k and P_v, [heads, length, d_head], from the parameters alone."""
    p = dict(module.named_parameters())
    if module.reparametrization is None:
        both = (p["key"], p["value"])
    else:
        hidden = F.linear(p["embedding.weight"], p["mlp.0.weight"], p["mlp.0.bias"]).tanh()
        both = F.linear(hidden, p["mlp.2.weight"], p["mlp.2.bias"]).split(D, -1)
    return tuple(t.reshape(-1, HEADS, D_HEAD).transpose(0, 1) for t in both)


def scores_of(query, key, mask, causal, scale=None):
    """Scores of the given keys, -inf where a query does not see one."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (D_HEAD**-0.5 if scale is None else scale)
    if causal:
        mask = torch.arange(key.shape[2]) <= torch.arange(query.shape[2])[:, None]
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask


def concatenated(module, query, key, value, mask=None, causal=False, scale=None, prefix=None):
    """Equation 7 of He et al.: softmax over the prefix and the keys together."""
    p_key, p_value = prefix_of(module) if prefix is None else prefix
    p_key, p_value = (p.expand(B, *p.shape[-3:]) for p in (p_key, p_value))
    own = scores_of(query, p_key, None, False, scale)
    weights = torch.cat((own, scores_of(query, key, mask, causal, scale)), -1).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, torch.cat((p_value, value), 2))


def gated(module, query, key, value, mask=None, causal=False, scale=None):
    """The layer's own attention and its log-sum-exp, given to `gate`; NaN where nothing is seen."""
    scores = scores_of(query, key, mask, causal, scale)
    # Rows that see nothing get what they give as constants: the softmax of nothing has NaN gradients by itself.
    nothing = (scores == -INF).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    output = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value).masked_fill(nothing, math.nan)
    return module.gate(query, output, scores.logsumexp(-1).masked_fill(nothing[..., 0], -INF), scale)


def outcome(module, output, tensors):
    own = ((f"own.{name}", p) for name, p in module.named_parameters())
    wanted = {name: t for name, t in [*tensors.items(), *own] if t.requires_grad}
    grads = torch.autograd.grad(output, [*wanted.values()], random(*output.shape, seed=9, dtype=output.dtype))
    return Outcome(output.detach(), dict(zip(wanted, grads)))


def agree(module, ours, expected, tensors):
    """Equal in float64, but for the order of summation."""
    assert not judge(outcome(module, ours, tensors), expected, expected)


@pytest.mark.parametrize("reparametrization", [None, 7])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens, keys", [*SIZES, (3, 0)])
def test_both_forms_are_the_concatenation(tokens, keys, causal, scale, reparametrization):
    module, t = trained(reparametrization=reparametrization), qkv(tokens, keys)
    expected = outcome(module, concatenated(module, **t, causal=causal, scale=scale), t)
    agree(module, module(**t, is_causal=causal, scale=scale), expected, t)
    if keys:
        agree(module, gated(module, **t, causal=causal, scale=scale), expected, t)


@pytest.mark.parametrize("tokens, keys", SIZES)
@pytest.mark.parametrize("name", list(masks(1, 1)))
def test_both_forms_under_a_mask(name, tokens, keys):
    module, t = trained(), qkv(tokens, keys)
    mask = masks(tokens, keys)[name]
    tensors = dict(t)
    if mask.is_floating_point():
        tensors["mask"] = mask = mask.detach().requires_grad_()
    output = concatenated(module, **t, mask=mask)
    if name == "nothing":  # lam = 1: neither keys nor values have a part in it
        bare = module(t["query"], t["key"][:, :, :0], t["value"][:, :, :0])
        torch.testing.assert_close(output, bare, rtol=0, atol=1e-14)
        module(**t, attn_mask=mask).sum().backward()
        assert torch.count_nonzero(t["key"].grad) == 0 and torch.count_nonzero(t["value"].grad) == 0
        tensors = {"query": t["query"]}
    expected = outcome(module, output, tensors)
    agree(module, module(**t, attn_mask=mask), expected, tensors)
    agree(module, gated(module, **t, mask=mask), expected, tensors)


@pytest.mark.parametrize("tokens, keys", SIZES)
def test_causal_is_aligned_as_pytorch_aligns_it(tokens, keys):
    module, t = trained(), qkv(tokens, keys)
    own = F.scaled_dot_product_attention(**t, is_causal=True)
    logsumexp = scores_of(t["query"], t["key"], None, True).logsumexp(-1)
    torch.testing.assert_close(module(**t, is_causal=True), module.gate(t["query"], own, logsumexp), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"^PrefixAdapter: attn_mask must be None beside is_causal=True"):
        module(**t, is_causal=True, attn_mask=torch.ones(tokens, keys))


def attention_of_pytorch(module, query, key, value, mask):
    """PyTorch's attention over the concatenation."""
    if mask is not None:
        mask = torch.cat((torch.full((40, L), mask.dtype == torch.bool, dtype=mask.dtype), mask), -1)
    keys, values = (torch.cat((p.expand(B, -1, -1, -1), t), 2) for p, t in zip(prefix_of(module), (key, value)))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reparametrization", [None, 7])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias"])
def test_rounding_of_the_concatenated_form(kind, reparametrization, dtype):
    """Eager is PyTorch's own attention over the concatenation, whose float32 kernel rounds more than the formula."""
    module, t = trained(dtype, reparametrization=reparametrization), qkv(40, 40, dtype)
    exact, u = copy.deepcopy(module).double(), {k: v.detach().double().requires_grad_() for k, v in t.items()}
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    bias = random(40, 40, seed=4).to(dtype).masked_fill(~causal.T, -INF)
    mask = {"none": None, "causal": causal, "bool": bias > 0, "bias": bias}[kind]
    given = dict(is_causal=True) if kind == "causal" else dict(attn_mask=mask)
    ours = outcome(module, module(**t, **given), t)
    eager = outcome(module, attention_of_pytorch(module, **t, mask=mask), t)
    assert not judge(ours, eager, outcome(exact, concatenated(exact, **u, mask=mask), u))


def gate_formula(module, query, output, logsumexp):
    """Equation 8 of He et al. as it is written."""
    p_key, p_value = prefix_of(module)
    scores = torch.einsum("bhqd,hld->bhql", query, p_key) * D_HEAD**-0.5
    ours, main = scores.exp().sum(-1, keepdim=True), logsumexp.exp().unsqueeze(-1)
    lam = ours / (ours + main)
    return ((1 - lam) * output + lam * torch.einsum("bhql,hld->bhqd", scores.softmax(-1), p_value)).to(output.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reparametrization", [None, 7])
def test_rounding_of_the_gated_form(reparametrization, dtype):
    module = trained(dtype, reparametrization=reparametrization)
    wide, t = torch.promote_types(dtype, torch.float32), dict(zip(("query", "output"), qkv(40, 40, dtype).values()))
    t["logsumexp"] = (random(B, HEADS, 40, seed=4, dtype=wide) + 2).requires_grad_()
    exact, u = copy.deepcopy(module).double(), {k: v.detach().double().requires_grad_() for k, v in t.items()}
    ours = outcome(module, module.gate(**t), t)
    assert not judge(ours, outcome(module, gate_formula(module, **t), t), outcome(exact, gate_formula(exact, **u), u))


def test_the_gate_of_pytorchs_own_logsumexp():
    """Its flash kernel's is not differentiable: the gradients of the prefix are exact all the same."""
    module, t = trained(), qkv(6, 9)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = flash(*t.values())
    assert not logsumexp.requires_grad
    expected = outcome(module, concatenated(module, **t), t)
    ours = outcome(module, module.gate(t["query"], output, logsumexp), t)
    assert {failure.split(":")[0] for failure in judge(ours, expected, expected)} == {"dquery", "dkey"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_the_gate_is_stable_at_any_size(size, dtype):
    module, query = trained(dtype), (random(B, HEADS, 5, D_HEAD, dtype=dtype) * size).requires_grad_()
    output = random(B, HEADS, 5, D_HEAD, seed=1, dtype=dtype).requires_grad_()
    alone = module.gate(query, torch.full_like(output, math.nan), torch.full((B, HEADS, 5), -INF))
    for value, expected in ((-1e30, alone), (-INF, alone), (INF, alone), (1e30, output), (3e38, output)):
        logsumexp = torch.full((B, HEADS, 5), value, requires_grad=True)
        got = module.gate(query, output, logsumexp)
        assert torch.equal(got, expected) and got.isfinite().all()
        for grad in torch.autograd.grad(got.sum(), [query, output, logsumexp, *module.parameters()]):
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reparametrization", [None, 7])
@pytest.mark.parametrize("frozen", [False, True])
def test_materialized(frozen, reparametrization, dtype):
    module = trained(dtype, reparametrization=reparametrization, dropout=0.3).requires_grad_(not frozen).eval()
    plain = module.materialize()
    assert set(plain.state_dict()) == {"key", "value"} and plain.reparametrization is None and plain.dropout == 0.3
    assert all(torch.equal(got, kept) for got, kept in zip(plain.keys_values(), module.keys_values()))
    t = qkv(3, 4, dtype)
    assert torch.equal(plain(**t), module(**t)) and not plain.training
    assert all(p.requires_grad is not frozen for p in plain.parameters())
    for p in plain.parameters():  # a file of it has no more than its 2 l d numbers: no view of a larger storage
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert p.data_ptr() not in [q.data_ptr() for q in module.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        again = module.materialize()
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), plain.parameters()))
    assert PrefixAdapter(D, HEADS, device="meta").materialize().key.is_meta


def test_dropout_only_in_training_and_for_each_sequence():
    module, t = trained(dropout=0.4), qkv(6, 7)
    torch.manual_seed(5)
    got = module(**t)
    torch.manual_seed(5)
    dropped = tuple(F.dropout(p.expand(B, -1, -1, -1), 0.4) for p in prefix_of(module))
    agree(module, got, outcome(module, concatenated(module, **t, prefix=dropped), t), t)
    same = {name: value[:1].expand_as(value) for name, value in t.items()}
    for output in (module(**same), module.gate(same["query"], same["query"], torch.zeros(B, HEADS, 6).double())):
        assert not torch.equal(output[0], output[1])
    module.eval()
    agree(module, module(**t), outcome(module, concatenated(module, **t), t), t)


@pytest.mark.parametrize("reparametrization, frozen", [(None, "key"), (7, "embedding"), (7, "mlp.2"), (7, "")])
def test_frozen_subsets(reparametrization, frozen):
    module, t = trained(reparametrization=reparametrization), qkv(5, 6)
    every = outcome(module, module(**t), t).grads
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    some = outcome(module, module(**t), t).grads
    assert len(some) < len(every) and set(some) >= {"query", "key", "value"}
    for name, grad in some.items():
        torch.testing.assert_close(grad, every[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("reparametrization, total", [(None, 2 * L * D), (7, L * D + D * 7 + 7 + 7 * 2 * D + 2 * D)])
def test_parameters(reparametrization, total):
    module = trained(reparametrization=reparametrization, dropout=0.5)
    assert sum(p.numel() for p in module.parameters()) == total
    network = {"embedding.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert set(module.state_dict()) == (network if reparametrization else {"key", "value"})
    for got, expected in zip(module.keys_values(), prefix_of(module)):
        assert got.shape == (HEADS, L, D_HEAD)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("length, total", [(200, 14_745_600), (512, 37_748_736), (30, 2_211_840)])
def test_parameter_counts_of_he_et_al_on_bart_large(length, total):
    """One prefix per attention of BART-large: 12 in the encoder, 24 in the decoder (their tables: 3.6 % and 9.2 %)."""
    modules = [PrefixAdapter(1024, 16, length, reparametrization=None, device="meta") for _ in range(36)]
    assert sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad) == total


def test_starts_as_he_et_al_do():
    torch.manual_seed(0)
    plain = PrefixAdapter(768, 12, 200, reparametrization=None)
    for p in plain.parameters():
        assert p.std().item() == pytest.approx(0.02, rel=0.02) and p.abs().max() > 0.06
    module = PrefixAdapter(768, 12, 200)
    assert module.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert module.mlp[0].weight.abs().max().item() == pytest.approx(768**-0.5, rel=1e-3)


@pytest.mark.parametrize("reparametrization", [None, 7])
def test_reset_and_meta_construction(reparametrization):
    torch.manual_seed(3)
    expected = PrefixAdapter(D, HEADS, L, reparametrization=reparametrization)
    deferred = PrefixAdapter(D, HEADS, L, reparametrization=reparametrization, device="meta")
    assert all(p.is_meta for p in deferred.parameters())
    query = torch.empty(B, HEADS, 3, D_HEAD, device="meta")
    assert deferred(query, query, query, is_causal=True).shape == deferred.gate(query, query, query[..., 0]).shape
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, p), (_, q) in zip(expected.named_parameters(), deferred.named_parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("reparametrization", [None, 7])
def test_copies(reparametrization, tmp_path):
    module, t = trained(reparametrization=reparametrization), qkv(5, 6)
    expected, options = module(**t), dict(reparametrization=reparametrization, dtype=torch.float64)
    loaded, from_file = (PrefixAdapter(D, HEADS, L, **options) for _ in range(2))
    loaded.load_state_dict(module.state_dict())
    save_model(module, tmp_path / "prefix.safetensors")
    load_model(from_file, tmp_path / "prefix.safetensors")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, from_file):
        assert torch.equal(other(**t), expected)
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(other.parameters(), module.parameters()))


@pytest.mark.parametrize("reparametrization", [None, 7])
def test_float32_masters_and_autocast(reparametrization):
    module, t = trained(torch.float32, reparametrization=reparametrization), qkv(5, 6, torch.bfloat16)
    output = module(**t)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and {p.grad.dtype for p in module.parameters()} == {torch.float32}
    gated = module.gate(t["query"], output, torch.zeros(B, HEADS, 5))
    assert torch.equal(gated, module.gate(t["query"].float(), output.float(), torch.zeros(B, HEADS, 5)).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(**qkv(5, 6, torch.float32)).dtype == gated.dtype == torch.bfloat16
        again = module.gate(t["query"], output, torch.zeros(B, HEADS, 5))
    assert reparametrization or torch.equal(again, gated)  # the scores keep their float32; the network is a linear's


@pytest.mark.parametrize("reparametrization", [None, 7])
@pytest.mark.parametrize("kind", ["none", "causal", "mask", "gate"])
def test_compiled_whole(kind, reparametrization):
    torch._dynamo.reset()
    module, t = trained(reparametrization=reparametrization), qkv(5, 6)
    call = module
    options = dict(is_causal=True) if kind == "causal" else dict(attn_mask=random(5, 6) > 0 if kind == "mask" else None)
    if kind == "gate":
        t, options, call = {"query": t["query"], "output": t["query"]}, dict(logsumexp=random(B, HEADS, 5)), module.gate
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    agree(module, compiled(**t, **options), outcome(module, call(**t, **options), t), t)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointed(dropout):
    module, t = trained(reparametrization=7, dropout=dropout), qkv(5, 6)
    results = []
    for call in (module, lambda *args: checkpoint(module, *args, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(outcome(module, call(*t.values()), t))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*(r.items() for r in results)))


def test_repr_is_its_construction():
    for options in ({}, dict(length=4, reparametrization=7, dropout=0.1)):
        module = PrefixAdapter(D, HEADS, **options)
        assert f"({module.extra_repr()}" in repr(module).replace("\n  ", "")
        assert eval(f"PrefixAdapter({module.extra_repr()})").extra_repr() == module.extra_repr()
    assert repr(module.materialize()) == "PrefixAdapter(48, 4, 4, reparametrization=None, dropout=0.1)"


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=0), "d_model must be an integer of at least 1, got 0"),
        (dict(heads=5), "heads must divide d_model = 48, got 5"),
        (dict(length=0), "length must be an integer of at least 1, got 0"),
        (dict(reparametrization=0), "reparametrization must be None or an integer of at least 1, got 0"),
        (dict(dropout=1.0), r"dropout must be a probability in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"^PrefixAdapter: {message}"):
        PrefixAdapter(**{"d_model": D, "heads": HEADS, **bad})


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("query", random(B, 6, D), ValueError, r"must be \[batch, heads, tokens, d_head\] = \[\*, 4, \*, 12\]"),
        ("query", random(B, 3, 6, D_HEAD), ValueError, r"must be .* got \[2, 3, 6, 12\]"),
        ("query", random(B, HEADS, 6, D_HEAD).float(), TypeError, r"is torch\.float32 beside the prefix of"),
        ("key", random(3, HEADS, 7, D_HEAD), ValueError, r"must be .* \[2, 4, \*, 12\], got \[3, 4, 7, 12\]"),
        ("key", torch.empty(B, HEADS, 7, D_HEAD, device="meta"), ValueError, "must be on the prefix's device cpu"),
        ("value", random(B, HEADS, 6, D_HEAD), ValueError, r"must be .* \[2, 4, 7, 12\], got \[2, 4, 6, 12\]"),
        ("value", None, TypeError, "must be a tensor, got NoneType"),
        ("attn_mask", torch.ones(6, 7).long(), TypeError, r"must be bool or floating point, got torch\.int64"),
        ("attn_mask", torch.ones(7), ValueError, r"must be of 2 to 4 dimensions .* \[2, 4, 6, 7\], got \[7\]"),
        ("attn_mask", torch.ones(6, 12), ValueError, r"must be of 2 to 4 .* \[2, 4, 6, 7\], got \[6, 12\]"),
        ("output", random(B, HEADS, 5, D_HEAD), ValueError, r"must be .* \[2, 4, 6, 12\], got \[2, 4, 5, 12\]"),
        ("logsumexp", random(B, HEADS, 6, 1), ValueError, r"must be \[batch, heads, tokens\] = \[2, 4, 6\]"),
    ],
)
def test_bad_calls(name, value, error, message):
    module, t = trained(), qkv(6, 7)
    with pytest.raises(error, match=f"^PrefixAdapter: {name} {message}"):
        if name in ("output", "logsumexp"):
            module.gate(**{"query": t["query"], "output": t["query"], "logsumexp": random(B, HEADS, 6), name: value})
        else:
            module(**{**t, name: value})
