"""What prefix tuning, multi-head parallel adapters and MAM compute in whole models: matrices and softmaxes, nothing of
the models' own attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D
from transformers_models import FF, HEADS, LAYERS, D, branch, make

from petl_kernels.nn import MultiHeadParallelAdapter, PrefixAdapter

IDS = torch.randint(2, 50, (2, 5), generator=torch.Generator().manual_seed(1))
SEEN = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()  # what is not padding


def projections(core):
    """Weights and biases of query, key and value."""
    if isinstance(core, nn.MultiheadAttention):
        return [*zip(core.in_proj_weight.chunk(3), core.in_proj_bias.chunk(3))]
    for name in ("qkv", "qkv_proj", "c_attn"):
        if hasattr(core, name):
            weight, bias = matrix(getattr(core, name)), getattr(core, name).bias
            sizes = (D, (len(weight) - D) // 2, (len(weight) - D) // 2)
            return [*zip(weight.split(sizes), (None,) * 3 if bias is None else bias.split(sizes))]
    names = ("query", "key", "value") if hasattr(core, "query") else ("q_proj", "k_proj", "v_proj")
    return [(getattr(core, name).weight, getattr(core, name).bias) for name in names]


def matrix(linear):
    """Its weight, [outputs, inputs]; GPT-2 has it the other way round."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def attention(core, out, x, memory, seen, rotate=lambda t: t):
    """The sub-layer with the method that is attached to it; `seen` [batch, 1, tokens or 1, keys]."""
    own, weights = core.petl, projections(core)
    q, k, v = (F.linear(t, *w) for t, w in zip((x, memory, memory), weights))
    d_head = D // HEADS
    heads = []
    for i in range(HEADS):
        j = i * k.shape[-1] // q.shape[-1]  # its key head
        of_q, of_k = (slice(n * d_head, (n + 1) * d_head) for n in (i, j))
        scores = rotate(q[..., of_q]) @ rotate(k[..., of_k]).mT / d_head**0.5
        scores, values = scores.masked_fill(~seen[:, 0], -torch.inf), v[..., of_k]
        if isinstance(own, PrefixAdapter):  # the concatenation
            scores = torch.cat((rotate(q[..., of_q]) @ own.key[:, of_k].mT / d_head**0.5, scores), -1)
            values = torch.cat((own.value[:, of_k].expand(len(x), -1, -1), values), 1)
        head = scores.softmax(-1) @ values
        if isinstance(own, MultiHeadParallelAdapter):
            normed = F.layer_norm(x, (D,), own.norm.weight, own.norm.bias)
            own_q = F.linear(normed, *weights[0])[..., of_q]
            head = head + 1.5 * F.relu(own_q @ own.key[i].T) @ own.value[i]
        heads.append(head)
    return F.linear(torch.cat(heads, -1), matrix(out), out.bias)


def beside(site, x):
    """What a parallel adapter, which only MAM has, adds there."""
    return branch(site.petl, x) if hasattr(site, "petl") else 0


def bert(model):
    x = model.embeddings(IDS)
    for layer in model.encoder.layer:
        out = layer.attention.output
        a = out.LayerNorm(attention(layer.attention.self, out.dense, x, x, SEEN[:, None, None]) + x)
        h = layer.output.dense(layer.intermediate(a))
        x = layer.output.LayerNorm(h + beside(layer.output.dropout, a) + a)
    return x


def vit(model):
    x = model.embeddings(pixels())
    for layer in model.encoder.layer:
        core, y = layer.attention.attention, layer.layernorm_before(x)
        everything = torch.ones(1, 1, 1, x.shape[1]).bool()
        a = x + attention(core, layer.attention.output.dense, y, y, everything)
        n = layer.layernorm_after(a)
        # The parallel adapter reads what the first linear reads.
        x = a + layer.output.dense(layer.intermediate.forward(n)) + beside(layer.output.dropout, n)
    return model.layernorm(x)


def llama(model):
    x = model.embed_tokens(IDS)
    cos, sin = model.rotary_emb(x, torch.arange(5)[None])
    for layer in model.layers:
        y, out = layer.input_layernorm(x), layer.self_attn.o_proj
        seen = (SEEN[:, None] & torch.ones(5, 5).bool().tril())[:, None]

        def rotate(t):
            return apply_rotary_pos_emb(t[:, None], t[:, None], cos, sin)[0][:, 0]

        x = x + attention(layer.self_attn, out, y, y, seen, rotate)
        n, site = layer.post_attention_layernorm(x), getattr(layer, "resid_mlp_dropout", layer.mlp)  # Phi-3 has one
        x = x + layer.mlp.forward(n) + beside(site, n)
    return model.norm(x)


def gpt2(model):
    x = model.wte(IDS) + model.wpe(torch.arange(5))
    for layer in model.h:
        y, seen = layer.ln_1(x), (SEEN[:, None] & torch.ones(5, 5).bool().tril())[:, None]
        x = x + attention(layer.attn, layer.attn.c_proj, y, y, seen)
        n = layer.ln_2(x)
        x = x + layer.mlp.forward(n) + beside(layer.mlp, n)
    return model.ln_f(x)


def bart(model):
    def feed_forward(layer, a):
        h = F.linear(layer.activation_fn(layer.fc1.forward(a)), layer.fc2.weight, layer.fc2.bias)
        return layer.final_layer_norm(a + h + beside(layer.fc2, a))

    def embedded(part, ids):
        return part.layernorm_embedding(part.embed_tokens(ids) + part.embed_positions(ids))

    memory = embedded(model.encoder, IDS)
    for layer in model.encoder.layers:
        core = layer.self_attn
        out = attention(core, core.out_proj, memory, memory, SEEN[:, None, None])
        memory = feed_forward(layer, layer.self_attn_layer_norm(memory + out))
    x, causal = embedded(model.decoder, IDS[:, :4]), torch.ones(4, 4).bool().tril()[None, None]
    for layer in model.decoder.layers:
        core = layer.self_attn
        x = layer.self_attn_layer_norm(x + attention(core, core.out_proj, x, x, causal))
        core = layer.encoder_attn
        out = attention(core, core.out_proj, x, memory, SEEN[:, None, None])
        x = feed_forward(layer, layer.encoder_attn_layer_norm(x + out))
    return x


def timm(model):
    x = hidden()
    for block in model:
        y = block.norm1(x)
        x = x + attention(block.attn, block.attn.proj, y, y, torch.ones(1, 1, 1, 5).bool())
        n = block.norm2(x)
        x = x + block.mlp.forward(n) + beside(block.mlp, n)
    return x


def torch_encoder(model):
    x, seen = hidden(), (SEEN[:, None] & torch.ones(5, 5).bool().tril())[:, None]
    for layer in model.layers:
        core, y = layer.self_attn, layer.norm1(x) if layer.norm_first else x
        a = x + attention(core, core.out_proj, y, y, seen)
        a = a if layer.norm_first else layer.norm1(a)
        n = layer.norm2(a) if layer.norm_first else a
        a = a + layer.linear2(F.relu(layer.linear1.forward(n))) + beside(layer.dropout2, n)
        x = a if layer.norm_first else layer.norm2(a)
    return x


def pixels():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def hidden():
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).double()


TRANSCRIPTIONS = {
    "bert": bert,
    "roberta": bert,
    "vit": vit,
    "llama": llama,
    "llama-grouped": llama,
    "phi3": llama,
    "gpt2": gpt2,
    "bart": bart,
    "timm": timm,
    "torch": torch_encoder,
    "torch-pre": torch_encoder,
}


def built(kind):
    if kind != "llama-grouped":
        return make(kind)
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=FF)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=1)
    return transformers.LlamaModel(config).double().eval()


def inputs(kind, dtype=torch.float64):
    """The arguments of a forward, with padding, or a causal mask, wherever the model takes one."""
    if kind.startswith("torch"):
        causal = torch.ones(5, 5).bool().triu(1)
        # Told, because PyTorch's own detection does not compile.
        return (hidden().to(dtype),), dict(mask=causal, is_causal=False, src_key_padding_mask=~SEEN)
    if kind in ("vit", "timm"):
        return ((pixels() if kind == "vit" else hidden()).to(dtype),), {}
    extra = dict(decoder_input_ids=IDS[:, :4]) if kind == "bart" else {}
    return (IDS,), dict(attention_mask=SEEN.long(), **extra)


def run(model, kind, dtype=torch.float64):
    args, kwargs = inputs(kind, dtype)
    output = model(*args, **kwargs)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state
