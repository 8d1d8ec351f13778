"""`petl_kernels.nn.MAM`: the two adapters with the published defaults, in a layer, and a module like any other."""

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

from petl_kernels.nn import MAM, ParallelAdapter, PrefixAdapter
from petl_kernels.testing import Outcome, judge

D, HEADS, B, TOKENS = 48, 4, 2, 7
D_HEAD = D // HEADS
SMALL = dict(prefix_length=5, bottleneck=6, reparametrization=7)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(**options):
    """A module whose parameters are far from where they start."""
    module = MAM(D, HEADS, dtype=torch.float64, **{**SMALL, **options})
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=10 + seed) * 0.4)
    return module


class Layer(nn.Module):
    """A frozen post-LN encoder layer with a MAM where its docstring puts the two."""

    def __init__(self, mam: MAM | None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(D, D, dtype=torch.float64) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, 60, dtype=torch.float64), nn.Linear(60, D, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.15)
        self.requires_grad_(False)
        self.mam = mam

    def forward(self, x, mask=None):
        q, k, v = (w(x).unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2) for w in self.projections[:3])
        heads = self.mam.prefix(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = F.layer_norm(x + self.projections[3](heads), (D,))
        return F.layer_norm(x + self.mam.parallel(x, self.fc2(F.gelu(self.fc1(x)))), (D,))

    def formula(self, x, mask):
        """The same from the parameters alone: equations 7 and table 1 of He et al."""
        p = dict(self.mam.named_parameters())
        hidden = (p["prefix.embedding.weight"] @ p["prefix.mlp.0.weight"].T + p["prefix.mlp.0.bias"]).tanh()
        prefix = (hidden @ p["prefix.mlp.2.weight"].T + p["prefix.mlp.2.bias"]).expand(B, -1, -1).split(D, -1)
        q, k, v = (w(x) for w in self.projections[:3])
        k, v = torch.cat((prefix[0], k), 1), torch.cat((prefix[1], v), 1)
        heads = []
        for qh, kh, vh in zip(*(t.split(D_HEAD, -1) for t in (q, k, v))):
            scores = qh @ kh.mT / D_HEAD**0.5
            scores[:, :, 5:] = scores[:, :, 5:].masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ vh)
        x = F.layer_norm(x + self.projections[3](torch.cat(heads, -1)), (D,))
        branch = torch.relu(x @ p["parallel.w_down"].T + p["parallel.b_down"]) @ p["parallel.w_up"].T
        added = 4.0 * (branch + p["parallel.b_up"])
        return F.layer_norm(x + self.fc2(F.gelu(self.fc1(x))) + added, (D,))


def outcome(layer, output, x):
    wanted = {"x": x} | {name: p for name, p in layer.mam.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), random(*output.shape, seed=9))
    return Outcome(output.detach(), dict(zip(wanted, grads)))


def test_a_layer_with_it_is_the_formula():
    layer, x, mask = Layer(trained()), random(B, TOKENS, D, seed=1).requires_grad_(), random(TOKENS, TOKENS) > 0
    expected = outcome(layer, layer.formula(x, mask), x)
    assert not judge(outcome(layer, layer(x, mask), x), expected, expected)
    assert len(expected.grads) == 10 and {n for n, p in layer.named_parameters() if p.requires_grad} == {
        f"mam.{name}" for name, _ in layer.mam.named_parameters()
    }


def test_defaults_are_the_published_ones():
    module = MAM(1024, 16, device="meta")
    assert type(module.prefix) is PrefixAdapter and type(module.parallel) is ParallelAdapter
    assert (module.prefix.length, module.prefix.reparametrization, module.prefix.dropout) == (30, 800, 0.0)
    parallel = module.parallel
    assert (parallel.bottleneck, parallel.scale, parallel.form) == (512, 4.0, "parallel")
    assert (parallel.activation, parallel.init) == ("relu", "lora") and parallel.b_up is not None


def test_options_reach_their_adapter():
    module = MAM(
        D,
        HEADS,
        prefix_length=3,
        bottleneck=4,
        scale="learned",
        reparametrization=None,
        prefix_dropout=0.2,
        bias=False,
        impl="reference",
        dtype=torch.bfloat16,
    )
    assert (module.prefix.length, module.prefix.reparametrization, module.prefix.dropout) == (3, None, 0.2)
    assert module.parallel.b_down is None and module.parallel.impl == "reference"
    assert module.parallel.scale.shape == (1,) and {p.dtype for p in module.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="form"):
        MAM(D, HEADS, form="sequential")


def test_the_parallel_adapter_starts_as_zero():
    module = MAM(D, HEADS, **SMALL, dtype=torch.float64)
    x, other = random(B, TOKENS, D), random(B, TOKENS, D, seed=1)
    assert torch.equal(module.parallel(x, other), other) and torch.count_nonzero(module.parallel(x)) == 0


def test_parameter_counts_of_he_et_al_on_bart_large():
    """12 encoder and 12 decoder layers, the latter with a second attention: 6.7 % of 406,291,456 in their tables."""
    sizes = dict(reparametrization=None, device="meta")
    layers = nn.ModuleList(MAM(1024, 16, **sizes) for _ in range(24))
    cross = nn.ModuleList(PrefixAdapter(1024, 16, 30, **sizes) for _ in range(12))

    def total(*modules):
        return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)

    assert total(layers, cross) == 27_414_528
    assert total(*(layer.parallel for layer in layers)) == 25_202_688
    assert total(layers[0]) == 2 * 30 * 1024 + 2 * 512 * 1024 + 512 + 1024
    bare = nn.ModuleList(MAM(1024, 16, bias=False, **sizes) for _ in range(24))
    assert total(bare, cross) == 27_377_664


def test_a_call_says_what_to_call():
    with pytest.raises(NotImplementedError, match=r"^MAM: .* call \.prefix\(.*\) .* and \.parallel\(.*\)"):
        MAM(D, HEADS, **SMALL)(random(B, TOKENS, D))


@pytest.mark.parametrize("reparametrization", [None, 7])
def test_reset_and_meta_construction(reparametrization):
    options = {**SMALL, "reparametrization": reparametrization, "scale": "channel"}
    torch.manual_seed(3)
    expected = MAM(D, HEADS, **options)
    deferred = MAM(D, HEADS, device="meta", **options)
    assert all(p.is_meta for p in deferred.parameters())
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, p), (_, q) in zip(expected.named_parameters(), deferred.named_parameters()):
        assert torch.equal(p, q), name


def test_copies(tmp_path):
    module, x, mask = trained(), random(B, TOKENS, D), torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    expected = Layer(module)(x, mask)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded, from_file = (MAM(D, HEADS, **SMALL, dtype=torch.float64) for _ in range(2))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    save_model(module, tmp_path / "mam.safetensors")
    load_model(from_file, tmp_path / "mam.safetensors")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, from_file):
        assert torch.equal(Layer(other)(x, mask), expected)
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(other.parameters(), module.parameters()))


@pytest.mark.parametrize("frozen", ["prefix", "parallel", "prefix.embedding", "parallel.b_", ""])
def test_frozen_subsets(frozen):
    layer, x = Layer(trained()), random(B, TOKENS, D, seed=1).requires_grad_()
    every = outcome(layer, layer(x), x).grads
    for name, p in layer.mam.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    some = outcome(layer, layer(x), x).grads
    assert len(some) < len(every)
    for name, grad in some.items():
        torch.testing.assert_close(grad, every[name], rtol=0, atol=1e-12)


def test_dropout_only_in_training():
    layer, x = Layer(trained(prefix_dropout=0.4)), random(B, TOKENS, D)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    without = Layer(trained())
    assert torch.equal(layer(x), without(x)) and torch.equal(without(x), without(x))


def test_compiled_whole():
    torch._dynamo.reset()
    layer, x, mask = Layer(trained()), random(B, TOKENS, D).requires_grad_(), random(TOKENS, TOKENS) > 0
    expected = outcome(layer, layer(x, mask), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert not judge(outcome(layer, compiled(x, mask), x), expected, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    layer, x = Layer(trained(prefix_dropout=0.4)), random(B, TOKENS, D).requires_grad_()
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        output = call(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in layer.mam.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_repr_shows_both():
    module = MAM(D, HEADS, reparametrization=None)
    assert repr(module).startswith("MAM(\n  48, 4\n  (prefix): PrefixAdapter(48, 4, 30, reparametrization=None)")
    assert "(parallel): ParallelAdapter(48, 512, activation='relu', scale=4.0, form='parallel'" in repr(module)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=0), "MAM: d_model must be an integer of at least 1, got 0"),
        (dict(heads=5), "MAM: heads must divide d_model = 48, got 5"),
        (dict(prefix_length=0), "MAM: prefix_length must be an integer of at least 1, got 0"),
        (dict(bottleneck=1.5), r"MAM: bottleneck must be an integer of at least 1, got 1\.5"),
        (dict(reparametrization=0), "MAM: reparametrization must be None or an integer of at least 1, got 0"),
        (dict(prefix_dropout=1.0), r"MAM: prefix_dropout must be a probability in \[0, 1\), got 1\.0"),
        (dict(scale="row"), "BottleneckAdapter: scale must be a float or one of .*, got 'row'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MAM(**{"d_model": D, "heads": HEADS, **bad})
