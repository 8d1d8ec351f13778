"""`LoRAMultiheadAttention` and `IA3MultiheadAttention`: nn.MultiheadAttention with the method put into its weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petl_kernels.nn import IA3MultiheadAttention, LoRAMultiheadAttention
from petl_kernels.profiling import count_launches

D, HEADS = 12, 3


def attention(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(D, HEADS, **{"batch_first": True, **options}).to(dtype)
    for p in made.parameters():  # biases start as zero
        nn.init.normal_(p, std=0.4)
    return made


def lora(of=None, targets=("query", "value"), **options):
    made = LoRAMultiheadAttention.from_attention(of or attention(), 2, targets, alpha=3.0, **options)
    nn.init.normal_(made.w_up, std=0.3)
    return made


def ia3(of=None, targets=("key", "value"), **options):
    made = IA3MultiheadAttention.from_attention(of or attention(), targets, **options)
    nn.init.normal_(made.factors, 1.0, 0.5)
    return made


def changed(module):
    """The weight and bias of the projection that the method stands for, differentiably."""
    weight, bias = [*module.in_proj_weight.chunk(3)], [*module.in_proj_bias.chunk(3)]
    for i, target in enumerate(module.targets):
        part = ("query", "key", "value").index(target)
        if isinstance(module, LoRAMultiheadAttention):
            up, down = module.w_up[i * D : (i + 1) * D], module.w_down[2 * i : 2 * (i + 1)]
            weight[part] = weight[part] + 1.5 * up @ down
        else:
            factors = module.factors[i * D : (i + 1) * D]
            weight[part], bias[part] = weight[part] * factors[:, None], bias[part] * factors
    return {"in_proj_weight": torch.cat(weight), "in_proj_bias": torch.cat(bias)}


def inputs(kind, batch_first=True, batched=True):
    """Query, key and value."""
    generator = torch.Generator().manual_seed(1)

    def draw(tokens):
        x = torch.randn(2, tokens, D, generator=generator, dtype=torch.float64)
        return (x if batch_first else x.transpose(0, 1) if batched else x[0]).requires_grad_()

    x = draw(5)
    if kind == "self":
        return x, x, x
    memory = draw(4)
    return (x, memory, memory) if kind == "cross" else (x, memory, draw(4))


CALLS = {
    "self": ("self", {}, {}),
    "cross": ("cross", {}, {}),
    "three inputs": ("three", {}, {}),
    "tokens first": ("cross", dict(batch_first=False), {}),
    "no batch": ("self", dict(batched=False, batch_first=False), {}),
    "padding": ("self", {}, dict(key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))),
    "causal": ("self", {}, dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(5).double(), is_causal=True)),
    "a mask per head": ("self", {}, dict(attn_mask=torch.rand(2 * HEADS, 5, 5) > 0.8)),
    "both masks": (
        "cross",
        {},
        dict(attn_mask=torch.zeros(5, 4), key_padding_mask=torch.tensor([[False, True] * 2] * 2)),
    ),
    "weights of each head": ("cross", {}, dict(average_attn_weights=False)),
}


@pytest.mark.parametrize("make", [lora, ia3])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no-weights"])
@pytest.mark.parametrize("kind, form, call", CALLS.values(), ids=CALLS)
def test_is_the_attention_with_changed_weights(make, weights, kind, form, call):
    plain = attention(batch_first=form.get("batch_first", True))
    module, given = make(copy.deepcopy(plain)), inputs(kind, **form)
    got, seen = module(*given, need_weights=weights, **call)
    call = (
        {
            name: mask.double() if name == "attn_mask" and mask.is_floating_point() else mask
            for name, mask in call.items()
        }
        if call
        else {}
    )
    options = dict(need_weights=True, **{k: v for k, v in call.items() if k != "is_causal"})
    expected, all_seen = torch.func.functional_call(plain, changed(module), given, options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert seen is None if not weights else torch.equal(seen.isnan(), all_seen.isnan())
    if weights:
        torch.testing.assert_close(seen, all_seen, rtol=1e-11, atol=1e-11)
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [*dict.fromkeys(given), *(p for n, p in module.named_parameters() if n in ("w_down", "w_up", "factors"))]
    for ours, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("targets", [("key",), ("value", "query"), ("query", "key", "value")])
@pytest.mark.parametrize("make", [lora, ia3])
@pytest.mark.parametrize("kind", ["self", "three"])
def test_targets(make, targets, kind):
    module, given = make(targets=targets), inputs(kind)
    expected, _ = torch.func.functional_call(attention(), changed(module), given)
    torch.testing.assert_close(module(*given)[0], expected, rtol=1e-11, atol=1e-11)
    merged = module.merge()
    assert type(merged) is nn.MultiheadAttention and merged.out_proj is module.out_proj
    assert not merged.in_proj_weight.requires_grad
    torch.testing.assert_close(merged(*given)[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [lora, ia3])
def test_starts_as_the_attention_and_shares_its_parameters(make):
    plain = attention()
    keys, given = set(plain.state_dict()), inputs("self")
    module = make(plain)
    module.reset_parameters()
    torch.testing.assert_close(module(*given)[0], plain(*given)[0], rtol=1e-12, atol=1e-12)
    assert module.in_proj_weight is plain.in_proj_weight and module.out_proj is plain.out_proj
    trained = {n for n, p in module.named_parameters() if p.requires_grad and not n.startswith("out_proj")}
    assert set(module.state_dict()) == keys | trained and trained in ({"w_down", "w_up"}, {"factors"})


@pytest.mark.parametrize("make", [lora, ia3])
def test_copies_compiles_and_has_no_bias(make):
    module = make(attention(torch.float32, bias=False))
    x = inputs("self")[0].detach().float()
    expected = module(x, x, x)[0]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x, x, x)[0], expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
    assert module.merge().in_proj_bias is None
    assert all(name in repr(module) for name in ("12, heads=3", "targets=("))


def test_no_dense_gradient_and_few_launches():
    module = lora(attention(torch.float32))
    x = inputs("self")[0].detach().float().requires_grad_()
    launches = count_launches(lambda: module.project(x, range(3))).total()
    y = module.project(x, range(3))
    back = count_launches(lambda: torch.autograd.grad(y, [x, module.w_down, module.w_up], y)).total()
    assert (launches, back) == (4, 7)  # as of LoRAMergedLinear
    assert module.in_proj_weight.grad is None


def test_dropout_of_the_branches():
    module, x = lora(dropout=0.5), inputs("self")[0]
    torch.manual_seed(3)
    got = module.train().project(x, range(3))
    torch.manual_seed(3)
    dropped, (weight, bias) = F.dropout(x, 0.5), (module.in_proj_weight, module.in_proj_bias)
    expected = F.linear(x, weight, bias)
    expected[..., :D] += 1.5 * dropped @ module.w_down[:2].T @ module.w_up[:D].T
    expected[..., 2 * D :] += 1.5 * dropped @ module.w_down[2:].T @ module.w_up[D:].T
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(module.eval().project(x, range(3)), lora().project(x, range(3)))


@pytest.mark.parametrize("make", [lora, ia3])
def test_the_fast_path_of_torchs_encoder_does_not_pass_it_by(make):
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True).double().eval()
    layer.self_attn = make(layer.self_attn).eval()
    x = inputs("self")[0].detach()
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer.train()(x).detach(), rtol=1e-11, atol=1e-11)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), 1).double().eval()
    encoder.layers[0].self_attn = make(encoder.layers[0].self_attn).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="unless enable_nested_tensor=False"):
        encoder(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lora(nn.Linear(2, 2)), TypeError, "attention must be an nn.MultiheadAttention, got Linear"),
        (lambda: lora(attention(kdim=5)), TypeError, "attention has widths or keys of its own"),
        (lambda: lora(lora()), TypeError, "attention has a forward of its own, that of LoRAMultiheadAttention"),
        (lambda: lora(targets=("q",)), ValueError, r"LoRAMultiheadAttention: targets must be some of .*, got \('q',\)"),
        (lambda: ia3(targets="key"), ValueError, "IA3MultiheadAttention: targets must be some of .*, got 'key'"),
        (lambda: LoRAMultiheadAttention(attention(), 0), ValueError, "rank must be an integer of at least 1, got 0"),
        (lambda: ia3(impl="fast"), ValueError, "IA3MultiheadAttention: impl must be"),
        (lambda: lora()(*inputs("self"), is_causal=True), ValueError, "a hint beside attn_mask, which is missing"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
    plain = attention()
    with pytest.raises((TypeError, ValueError)):
        LoRAMultiheadAttention.from_attention(plain, 2, ("wrong",))
    assert all(p.requires_grad for p in plain.parameters())
