"""`attach` and `detach`: where each method goes, what it computes there, how much it trains, and that it leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers_models import FF, HEADS, LAYERS, MODELS, D, branch, make, run, shaken, without_memory

import petl_kernels
from petl_kernels.methods import METHODS, After, Method, attach, detach, find_blocks, register
from petl_kernels.nn import BottleneckAdapter

POST_LN = ("bert", "roberta", "bart", "torch")
TORCH, FUSED_QKV = ("torch", "torch-pre"), ("timm", "phi3", "gpt2")
# Options that make a method's first forward the identity, and some for the others.
IDENTITY = {
    "houlsby": dict(bottleneck=4, init="lora"),
    "pfeiffer": dict(bottleneck=4, init="lora"),
    "parallel": dict(bottleneck=4),
    "adaptformer": dict(bottleneck=4),
    "adapter_plus": dict(bottleneck=4, init="lora"),
    "low_rank_pal": dict(bottleneck=4, init="lora"),
    "lora": dict(rank=3),
    "ia3": {},
    "sct": dict(k=4, scale=0.0),
    "diff_pruning": {},
    "layer_norm": {},
    "multi_head_parallel": dict(bottleneck=4, init="lora"),
    "prefix": dict(length=3),  # no prefix is the identity
    "mam": dict(prefix_length=3, bottleneck=4),
}
PLACED = [name for name, method in METHODS.items() if method.place is not None]


def refusal(kind: str, method: str) -> str | None:
    """Why this method has no place in this model."""
    if method in ("adaptformer", "sct") and kind in POST_LN:
        return "post-LN"
    if method == "diff_pruning" and kind in (*TORCH, "gpt2"):
        return "wants an nn.Linear, and .* has none" if kind == "gpt2" else "reads weights without calling them"
    return None


PAIRS = [(kind, method) for kind in MODELS for method in PLACED]


@pytest.mark.parametrize("kind", MODELS)
def test_blocks(kind):
    blocks = find_blocks(make(kind))
    assert len(blocks) == (2 if kind == "bart" else 1) * LAYERS and {block.width for block in blocks} == {D}
    assert all((block.norm is not None) == (kind in POST_LN) for block in blocks)
    assert all((block.norm is None) == (block.stream is not None) for block in blocks)
    attentions = [len(block.attentions) for block in blocks]
    assert attentions == ([1, 1, 2, 2] if kind == "bart" else [1] * LAYERS)


@pytest.mark.parametrize("kind, method", PAIRS)
def test_starts_as_the_model_and_leaves_it_as_it_was(kind, method):
    model = make(kind)
    before, keys, flags = run(model), list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    classes = [type(m) for m in model.modules()]
    reason = refusal(kind, method)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            attach(model, method, **IDENTITY[method])
    else:
        report = attach(model, method, **IDENTITY[method])
        if method in ("prefix", "mam"):
            assert not torch.equal(run(model), before)
        else:
            torch.testing.assert_close(run(model), before, rtol=0, atol=1e-14)
        assert set(keys) <= set(model.state_dict())
        assert report.trained == [name for name, p in model.named_parameters() if p.requires_grad] != []
        assert all(name in str(report) for name in report.inserted)
        if method != "sct":  # which is multiplied by zero here
            assert not torch.equal(run(shaken(model, report.trained)), before)
        run(model).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        for name in report.trained:  # norms keep what was trained; undo the shaking
            if name in keys:
                model.get_parameter(name).data.copy_(make(kind).get_parameter(name))
        detach(model)
    assert torch.equal(run(model), before) and list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- What each computes, as transcriptions of the blocks of BERT and ViT ---------------------------------------------
def bert_block(layer: nn.Module, x: torch.Tensor, attention=lambda h: h, ffn=lambda a, h: h, norm=None) -> torch.Tensor:
    """A BERT layer with functions of the sub-layers' outputs, and of the last norm's two arguments, put in."""
    out = layer.attention.output
    a = out.LayerNorm.forward(attention(out.dense(layer.attention.self(x)[0])) + x)
    h = ffn(a, layer.output.dense(layer.intermediate.forward(a)))
    return layer.output.LayerNorm.forward(h + a) if norm is None else norm(layer.output.LayerNorm.forward, h, a)


def through(model: nn.Module, block) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = model.embeddings(torch.randint(2, 50, (2, 5), generator=generator))
    for i, layer in enumerate(model.encoder.layer):
        x = block(i, layer, x)
    return x


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


TRANSCRIPTIONS = {
    "houlsby": lambda i, layer, x: bert_block(
        layer,
        x,
        attention=lambda h: h + branch(layer.attention.output.dropout.petl, h, gelu_tanh),
        ffn=lambda a, h: h + branch(layer.output.dropout.petl, h, gelu_tanh),
    ),
    "pfeiffer": lambda i, layer, x: bert_block(
        layer, x, norm=lambda ln, h, a: ln(h + branch(layer.output.LayerNorm.petl, ln(h + a)) + a)
    ),
    "parallel": lambda i, layer, x: bert_block(layer, x, ffn=lambda a, h: h + branch(layer.output.dropout.petl, a)),
    "low_rank_pal": lambda i, layer, x: bert_block(
        layer, x, ffn=lambda a, h: h + branch(layer.output.dropout.petl, x, F.gelu)
    ),
    "adapter_plus": lambda i, layer, x: (y := bert_block(layer, x)) + branch(layer.petl, y, F.gelu),
}


@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_computes_its_formula_in_bert(method):
    model = make("bert")
    options = IDENTITY[method] | (dict(scale=2.0) if method == "parallel" else {})
    shaken(model, attach(model, method, **options).trained)
    torch.testing.assert_close(run(model), through(model, TRANSCRIPTIONS[method]), rtol=1e-11, atol=1e-11)


def test_lora_and_ia3_compute_their_formulas_in_bert():
    plain, changed = make("bert"), make("bert")
    for method in ("lora", "ia3"):
        report = attach(changed, method, **({"rank": 3, "alpha": 6.0} if method == "lora" else {}))
        shaken(changed, report.trained)
        for name in report.inserted:
            linear, module = plain.get_submodule(name), changed.get_submodule(name)
            if method == "lora":
                linear.weight.data += 2.0 * module.w_up @ module.w_down
            elif "output.dense" in name:
                linear.weight.data *= module.scale
            else:
                linear.weight.data *= module.scale[:, None]
                linear.bias.data *= module.scale
        torch.testing.assert_close(run(changed), run(plain), rtol=1e-11, atol=1e-11)
        detach(changed)
        plain = make("bert")


@pytest.mark.parametrize("kind, keys", [("timm", D), ("gpt2", D), ("phi3", D // HEADS)])
def test_lora_on_slices_of_a_fused_projection(kind, keys):
    plain, changed = make(kind), make(kind)
    targets = ["value", "query", "output"] if kind != "gpt2" else ["value", "query"]
    report = attach(changed, "lora", rank=3, alpha=6.0, targets=targets)
    assert len(report.inserted) == LAYERS * (len(targets) - 1)
    shaken(changed, report.trained)
    for name in report.inserted:
        weight, module = plain.get_submodule(name).weight.data, changed.get_submodule(name)
        if not hasattr(module, "slices"):
            weight += 2.0 * module.w_up @ module.w_down
            continue
        rows = weight.T if kind == "gpt2" else weight
        rows[:D] += 2.0 * module.w_up[:D] @ module.w_down[:3]
        rows[D + keys :] += 2.0 * module.w_up[D:] @ module.w_down[3:]
        assert rows.shape[0] == D + 2 * keys and module.w_up.shape[0] == D + keys
    torch.testing.assert_close(run(changed), run(plain), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [*TORCH, *FUSED_QKV])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_merged_they_are_the_model_with_changed_weights(kind, method):
    model = make(kind)
    report = attach(model, method, **IDENTITY[method])
    shaken(model, report.trained)
    expected = run(model)
    for name in report.inserted:
        model.set_submodule(name, model.get_submodule(name).merge())
    torch.testing.assert_close(run(model), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["adaptformer", "sct"])
def test_computes_its_formula_in_a_vit(method):
    model = make("vit")
    shaken(model, attach(model, method, **IDENTITY[method] | (dict(scale=0.7) if method == "sct" else {})).trained)
    plain = make("vit")
    x = plain.embeddings(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double())
    for layer, own in zip(plain.encoder.layer, model.encoder.layer):
        attended = layer.attention(layer.layernorm_before(x))
        a = x + (attended if isinstance(attended, torch.Tensor) else attended[0])
        if method == "sct":
            adapter = own.attention.output.dropout.petl.adapter
            c = adapter.channels
            a = a.index_copy(-1, c, a[..., c] + 0.7 * (a[..., c] @ adapter.weight.T + adapter.bias))
        h = layer.output.dense(layer.intermediate(layer.layernorm_after(a)))
        x = a + h + (branch(own.output.dropout.petl, a) if method == "adaptformer" else 0)
    torch.testing.assert_close(run(model), plain.layernorm(x), rtol=1e-11, atol=1e-11)


# --- How much trains ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, method", [p for p in PAIRS if refusal(*p) is None and p[0] in ("bert", "vit", "llama", "timm", "gpt2")]
)
def test_the_table_counts_what_is_attached(kind, method):
    model = make(kind)
    inserted = {n: p for n, p in model.named_parameters()}
    linears = [m for m in model.get_submodule(find_blocks(model)[0].name).modules() if isinstance(m, nn.Linear)]
    parts = dict(p=sum(m.weight.numel() for m in linears), o=sum(m.out_features for m in linears))
    parts["b"] = sum(m.out_features for m in linears if m.bias is not None)
    report = attach(model, method, **IDENTITY[method])
    own = sum(model.get_parameter(name).numel() for name in report.trained if name not in inserted)
    sizes = dict(
        d=D, f=FF, a=1, s=2, r=IDENTITY[method].get("bottleneck", IDENTITY[method].get("rank", 0)), k=4, l=3, **parts
    )
    assert own == LAYERS * METHODS[method].count(**sizes)


@pytest.mark.parametrize(
    "model, method, options, count",
    [
        # Houlsby et al. 2019: 2.1 % of BERT large at 64, about 2M of BERT base; layer norms "40k".
        ("bert-large", "houlsby", dict(bottleneck=8), 936_320),
        ("bert-large", "houlsby", dict(bottleneck=64), 6_444_032),
        ("bert-large", "houlsby", dict(bottleneck=256), 25_327_616),
        ("bert-large", "houlsby", dict(bottleneck=2), 346_208),
        ("bert-base", "houlsby", dict(bottleneck=64), 2_417_664),
        ("bert-base", "houlsby", dict(bottleneck=8), 351_936),
        ("bert-base", "houlsby", dict(bottleneck=256), 9_500_160),
        ("bert-base", "layer_norm", {}, 38_400),
        ("bert-large", "layer_norm", {}, 100_352),
        # He et al. 2021, table 11, which counts no biases, and with them.
        ("bart-large", "parallel", dict(bottleneck=200, bias=False), 9_830_400),
        ("bart-large", "parallel", dict(bottleneck=512, bias=False), 25_165_824),
        ("bart-large", "parallel", dict(bottleneck=1024, bias=False), 50_331_648),
        ("bart-large", "parallel", dict(bottleneck=512), 25_202_688),
        ("bart-large", "parallel", dict(bottleneck=200), 9_859_776),
        ("bart-large", "pfeiffer", dict(bottleneck=600, bias=False), 29_491_200),
        ("bart-large", "lora", dict(rank=200), 29_491_200),
        ("bart-large", "prefix", dict(length=200), 14_745_600),
        ("bart-large", "prefix", dict(length=512), 37_748_736),
        ("bart-large", "mam", dict(prefix_length=30, bottleneck=512, bias=False), 27_377_664),
        ("bart-large", "mam", {}, 27_414_528),
        # With the layer norms of their code, 73,728; a network for each attention; a learned scalar for each adapter.
        ("bart-large", "multi_head_parallel", dict(bottleneck=512), 37_748_736 + 73_728),
        ("bart-large", "prefix", dict(reparametrization=800), 36 * (30 * 1024 + 1024 * 800 + 800 + 800 * 2048 + 2048)),
        ("bart-large", "parallel", dict(bottleneck=512, bias=False, scale="learned"), 25_165_824 + 24),
        # SCT: 0.11M at K = 96, 0.44M at K = 192.
        *(("vit", "sct", dict(k=k), 12 * (k * k + k)) for k in (32, 96, 192, 384)),
    ],
)
def test_published_parameter_counts(model, method, options, count):
    model = without_memory(model)
    report = attach(model, method, **options)
    assert sum(model.get_parameter(name).numel() for name in report.trained) == count


def test_published_shares():
    """He et al. print percents of BART large, cut to a decimal."""
    counts = {14_745_600: 3.6, 37_748_736: 9.2, 9_830_400: 2.4, 25_165_824: 6.1, 50_331_648: 12.3}
    counts |= {29_491_200: 7.2, 25_067_520: 6.1, 27_377_664: 6.7, 27_279_360: 6.7}
    assert all(1000 * count // 406_291_456 == round(10 * share) for count, share in counts.items())
    sizes = {name: sum(p.numel() for p in without_memory(name).parameters()) for name in ("bert-base", "bert-large")}
    assert sizes == {"bert-base": 109_482_240, "bert-large": 335_141_888}
    assert sum(p.numel() for p in without_memory("bart-large").parameters()) == 406_291_456


# --- A model like any other -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "lora", "ia3", "diff_pruning"])
def test_copies(method):
    model = make("bert")
    shaken(model, attach(model, method, **IDENTITY[method]).trained)
    expected = run(model)
    other = make("bert")
    attach(other, method, **IDENTITY[method])
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(run(copied), expected)
    shaken(model, ["embeddings.word_embeddings.weight"])
    detach(model)
    assert torch.equal(run(other), expected)


@pytest.mark.parametrize("method", ["houlsby", "parallel", "lora"])
def test_gradient_checkpointing(method):
    model = make("bert")
    report = attach(model, method, keep_trainable="embeddings.*", **IDENTITY[method])
    shaken(model, report.trained)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        run(model).square().sum().backward()
        grads.append([model.get_parameter(name).grad.clone() for name in report.trained])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("method", ["houlsby", "parallel", "lora", "ia3"])
def test_compiles_whole(method):
    torch._dynamo.reset()
    model = make("timm" if method in ("houlsby", "parallel") else "llama", torch.float32)
    shaken(model, attach(model, method, **IDENTITY[method]).trained)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), run(model))
    x = torch.randn(2, 5, D) if method in ("houlsby", "parallel") else torch.randint(2, 50, (2, 5))
    got, expected = compiled(x), model(x)
    got, expected = (v if isinstance(v, torch.Tensor) else v.last_hidden_state for v in (got, expected))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["torch", "torch-pre"])
def test_the_fast_path_of_torchs_encoder_does_not_pass_it_by(kind):
    model = make(kind, torch.float32)
    shaken(model, attach(model, "houlsby", bottleneck=4).trained)
    with torch.inference_mode():
        torch.testing.assert_close(run(model), run(model.train()), rtol=1e-5, atol=1e-5)


def test_a_head_goes_on_training():
    model = nn.ModuleDict({"body": make("bert"), "head": nn.Linear(D, 2)})
    report = attach(model, "lora", rank=2, keep_trainable="head.*")
    assert {"head.weight", "head.bias"} <= set(report.trained)
    assert all(name.startswith("head.") or ".w_" in name for name in report.trained)
    report.detach()
    report.detach()  # a second time does nothing
    assert all(p.requires_grad for p in model.parameters())


def test_a_method_of_ones_own():
    def place(model, block, *, bottleneck):
        for attention in block.attentions:
            yield After(attention.branch, BottleneckAdapter(block.width, bottleneck).double())

    method = Method("attention_only", "", "sequential", "attention", "h + dh", "a*(2*d*r + d + r)", "", place)
    model = make("bart")
    report = petl_kernels.attach(model, method, bottleneck=3)
    own = sum(model.get_parameter(name).numel() for name in report.trained)
    assert len(report.inserted) == 6 and own == 6 * method.count(d=D, r=3, a=1)
    petl_kernels.detach(model)
    with pytest.raises(ValueError, match="there is a method 'houlsby' already"):
        register(METHODS["houlsby"])
    register(method)
    try:
        assert attach(model, "attention_only", bottleneck=2).method == "attention_only"
    finally:
        del METHODS["attention_only"]


# --- What is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, method, options, error, message",
    [
        ("bert", "hulsby", {}, ValueError, r"attach: method must be one of \('houlsby', .*\), got 'hulsby'"),
        ("bert", "prefix", dict(length=0), ValueError, "PrefixAdapter: length must be an integer of at least 1, got 0"),
        ("bert", "mam", dict(length=3), TypeError, "length"),
        ("bert", "houlsby", dict(width=3), TypeError, "width"),
        ("bert", "houlsby", dict(bottleneck=0), ValueError, "bottleneck must be an integer of at least 1, got 0"),
        ("bert", "houlsby", dict(keep_trainable="head.*"), ValueError, r"keep_trainable 'head\.\*' matches nothing"),
        ("bert", "lora", dict(targets=("query", "gate")), ValueError, "wants a linear 'gate' of the attention in"),
        ("torch", "lora", dict(targets=["output"]), ValueError, r"wants a linear 'output' .* which has \[\]"),
        ("gpt2", "lora", dict(targets=["output"]), TypeError, "LoRALinear: linear must be an nn.Linear, got Conv1D"),
        ("vit", "sct", {}, ValueError, "sct needs channels"),
    ],
)
def test_bad_calls_change_nothing(kind, method, options, error, message):
    model = make(kind)
    before, keys = run(model), list(model.state_dict())
    run(model).sum().backward()
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        attach(model, method, **options)
    assert torch.equal(run(model), before) and list(model.state_dict()) == keys
    assert all(p.requires_grad and p.grad is g for p, g in zip(model.parameters(), grads))


def test_one_method_at_a_time():
    model = make("bert")
    with pytest.raises(ValueError, match="detach: no method is attached"):
        detach(model)
    attach(model, "lora", rank=2)
    with pytest.raises(RuntimeError, match="attach: 'lora' is attached to this model; detach it first"):
        attach(model, "houlsby")
    with pytest.raises(TypeError, match=r"attach: model must be an nn\.Module, got str"):
        attach("bert", "lora")
    with pytest.raises(ValueError, match="attach: Linear has no transformer block of a known kind"):
        attach(nn.Linear(2, 2), "lora")
    assert HEADS == 2
