"""Methods inside the attention: prefix, multi-head parallel adapter and MAM, held to transcriptions of the models."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_models import IDS, SEEN, TRANSCRIPTIONS, built, hidden, run
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from transformers_models import FF, HEADS, D, make, shaken

from petl_kernels.methods import Inside, Method, attach, detach, placements
from petl_kernels.methods.insertions import Instead
from petl_kernels.nn import LoRALinear

OPTIONS = {
    "prefix": dict(length=3),
    "multi_head_parallel": dict(bottleneck=3, scale=1.5),
    "mam": dict(prefix_length=3, bottleneck=4, scale=2.0),
}


def attached(kind, method, **options):
    """A model with the method, its parameters far from where they start."""
    model = built(kind)
    return shaken(model, attach(model, method, **OPTIONS[method] | options).trained)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("kind", TRANSCRIPTIONS)
def test_computes_its_formula(kind, method):
    model = attached(kind, method)
    torch.testing.assert_close(run(model, kind), TRANSCRIPTIONS[kind](model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "llama-grouped", "bart"])
def test_caches_hold_no_prefix(kind):
    """Token by token with the model's cache is the whole sequence at once, also where keys are shared by heads."""
    model = attached(kind, "prefix")
    if kind == "bart":
        whole = model(IDS, decoder_input_ids=IDS[:, :4]).last_hidden_state
        cache, steps, encoded = None, [], model.encoder(IDS)
        for i in range(4):
            out = model(encoder_outputs=encoded, decoder_input_ids=IDS[:, i : i + 1], past_key_values=cache)
            cache = out.past_key_values
            steps.append(out.last_hidden_state)
    else:
        whole = model(IDS).last_hidden_state
        cache, steps = None, []
        for part in (IDS[:, :2], IDS[:, 2:3], IDS[:, 3:]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)


# --- nn.MultiheadAttention, of which the forward is ours --------------------------------------------------------------
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads", "padding", "both"])
def test_multihead_attention_is_pytorchs_but_for_what_stands_in(batch_first, mask):
    """With PyTorch's own function put in, nothing changes, whatever the masks and layouts."""
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    causal, kwargs = torch.ones(5, 5).bool().triu(1), {}
    if mask == "heads":
        kwargs["mask"] = torch.randn(2 * HEADS, 5, 5).double()
    elif mask in ("bool", "float", "both"):
        kwargs["mask"] = causal if mask != "float" else torch.zeros(5, 5).double().masked_fill(causal, -torch.inf)
    if mask in ("padding", "both"):
        kwargs["src_key_padding_mask"] = ~SEEN
    x = hidden() if batch_first else hidden().transpose(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about masks of two kinds
        expected, alone = model(x, **kwargs), model(x[0]) if mask == "none" else None
        attach(model, Method("own", "", "", "", "", "", "", lambda *_: iter([Inside("layers.0.self_attn", _Plain())])))
        torch.testing.assert_close(model(x, **kwargs), expected, rtol=1e-12, atol=1e-12)
        if alone is not None:
            torch.testing.assert_close(model(x[0]), alone, rtol=1e-12, atol=1e-12)


class _Plain(nn.Module):
    """Attention as it is."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


@pytest.mark.parametrize("method", ["houlsby", "prefix", "multi_head_parallel"])
def test_padded_batches_of_torchs_encoder(method):
    """Which PyTorch packs as nested tensors in inference, unless told otherwise; as before once detached."""
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    x = hidden().float()
    report = attach(model, method)
    expected = model.train()(x, src_key_padding_mask=~SEEN)[SEEN]
    torch.testing.assert_close(model.eval()(x, src_key_padding_mask=~SEEN)[SEEN], expected, rtol=1e-5, atol=1e-5)
    report.detach()
    assert model.use_nested_tensor


# --- A model like any other -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, method", [("bert", "mam"), ("bart", "prefix"), ("timm", "multi_head_parallel")])
def test_copies(kind, method):
    model = attached(kind, method)
    expected = run(model, kind)
    other = attached(kind, method)
    other.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other]
    shaken(model, [name for name, p in model.named_parameters() if p.requires_grad])
    assert all(torch.equal(run(copied, kind), expected) for copied in copies)
    assert not torch.equal(run(model, kind), expected)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("kind", ["bert", "llama-grouped", "timm", "torch"])
def test_compiles_whole(kind, method):
    torch._dynamo.reset()
    model = attached(kind, method).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = run(compiled, kind, torch.float32), run(model, kind, torch.float32)
    torch.testing.assert_close(got, expected)
    grads = []
    for output in (got, expected):
        model.zero_grad()
        output.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, method", [("bert", "prefix"), ("bart", "mam"), ("vit", "multi_head_parallel")])
def test_gradient_checkpointing_with_dropout(kind, method):
    dropout = "prefix_dropout" if method == "mam" else "dropout"
    model = attached(kind, method, **{dropout: 0.3}).train()
    shaken(model, ["encoder.layer.0.output.dense.bias"] if kind != "bart" else ["encoder.layers.0.fc2.bias"])
    for module in model.modules():  # that of the attention weights, too
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.2
        elif type(module).__name__ == "BartAttention":
            module.dropout = 0.2
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        run(model, kind).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)
    model.eval()
    assert torch.equal(run(model, kind), run(model, kind))


def test_a_network_makes_the_prefix_until_it_is_materialized():
    model = attached("bert", "prefix", reparametrization=7)
    expected = run(model, "bert")
    for layer in model.encoder.layer:
        layer.attention.self.petl = layer.attention.self.petl.materialize()
    assert torch.equal(run(model, "bert"), expected)


def test_a_combination_of_ones_own():
    """He et al., table 6: prefixes of 30 and LoRA of rank 102 at the feed-forward part of BART large."""

    def place(model, block):
        yield from placements.prefix(model, block, length=30)
        for name in (block.feed_forward.input, block.feed_forward.down):
            yield Instead(name, LoRALinear.from_linear(model.get_submodule(name), 102))

    with torch.device("meta"):
        model = transformers.BartModel(transformers.BartConfig())
    report = attach(model, Method("prefix_lora", "", "", "", "", "", "", place))
    assert sum(model.get_parameter(name).numel() for name in report.trained) == 27_279_360
    assert len(report.inserted) == 36 + 2 * 24


# --- What is refused --------------------------------------------------------------------------------------------------
def test_attention_that_cannot_be_entered_is_refused():
    eager = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=D, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=FF
    )
    eager._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r"within F\.scaled_dot_product_attention.* runs 'eager'; load the model with"):
        attach(transformers.ViTModel(eager), "mam")
    timm = make("timm")
    timm[1].attn.fused_attn = False
    with pytest.raises(ValueError, match="the attention in '1' has fused_attn off"):
        attach(timm, "prefix")
    del timm[1].attn.num_heads
    with pytest.raises(ValueError, match="Attention, the attention in '1', tells no number of heads"):
        attach(timm, "multi_head_parallel")
    encoder = make("torch")
    encoder.layers[0].self_attn = nn.MultiheadAttention(D, HEADS, add_bias_kv=True, batch_first=True)
    with pytest.raises(ValueError, match=r"'layers\.0' has widths or keys of its own"):
        attach(encoder, "prefix")
    wide = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=FF, head_dim=6
    )
    with pytest.raises(ValueError, match=r"multi_head_parallel wants queries as wide as the model, .* makes 12 of 16"):
        attach(transformers.LlamaModel(wide), "multi_head_parallel")
    with pytest.raises(ValueError, match=r"outside has to be called by the attention itself; use .*\.MAM"):
        attach(make("bert"), Method("outside", "", "", "", "", "", "", None, "MAM"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_that_turns_out_not_to_call_the_function_raises():
    """BERT asked for attention weights computes them by hand. Nothing stays behind, and the next call is as ever."""
    model = attached("bert", "prefix")
    expected = run(model, "bert")
    with pytest.raises(RuntimeError, match=r"PrefixAdapter stands in for .* BertSdpaSelfAttention called 0 times"):
        model(IDS, output_attentions=True)
    with pytest.raises(IndexError):
        model(torch.full((1, 5), 50))
    assert not _get_current_function_mode_stack()
    assert torch.equal(run(model, "bert"), expected)
    encoder = attached("torch", "prefix")
    with pytest.raises(ValueError, match="PrefixAdapter in MultiheadAttention wants need_weights=False"):
        encoder.layers[0].self_attn(hidden(), hidden(), hidden())


def test_a_forward_that_somebody_set_is_called_and_put_back():
    model, calls = make("bert"), []
    core = model.encoder.layer[0].attention.self
    plain = run(model, "bert")

    def forward(*args, **kwargs):
        calls.append(1)
        return type(core).forward(core, *args, **kwargs)

    core.forward = forward
    attach(model, "prefix", length=3)
    assert not torch.equal(run(model, "bert"), plain) and calls
    ours, core.forward = core.forward, forward
    with pytest.raises(RuntimeError, match=r"forward of 'encoder\.layer\.0\.attention\.self' is no longer the one"):
        detach(model)
    core.forward = ours
    detach(model)
    assert core.forward is forward and torch.equal(run(model, "bert"), plain)
