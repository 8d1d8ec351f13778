"""Small transformers, and large ones without memory, at which methods attach."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from petl_kernels.nn import BottleneckAdapter

D, FF, LAYERS, HEADS = 16, 32, 2, 2
_BERT = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FF)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class TimmBlock(nn.Module):
    """A block with the names of timm's, which cannot be installed beside a CPU build of torch."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).reshape(x.shape))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, FF), nn.Linear(FF, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(nn.functional.gelu(self.fc1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), TimmBlock.Attention()
        self.norm2, self.mlp = nn.LayerNorm(D), TimmBlock.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit5Block(nn.Module):
    """A block with the names of the ViT of transformers 5, beside which the `adapters` library cannot be installed."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_attention_heads, self.q_proj, self.k_proj = HEADS, nn.Linear(D, D), nn.Linear(D, D)
            self.v_proj, self.o_proj = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            split = (*x.shape[:2], HEADS, D // HEADS)
            q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o_proj(y.transpose(1, 2).reshape(x.shape)), None

    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before, self.attention = nn.LayerNorm(D), Vit5Block.Attention()
        self.layernorm_after, self.mlp = nn.LayerNorm(D), TimmBlock.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))[0]
        return x + self.mlp(self.layernorm_after(x))


def _torch_encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def _bart(**sizes: int) -> nn.Module:
    return transformers.BartModel(transformers.BartConfig(vocab_size=50, dropout=0.0, **sizes))


MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=50, **_BERT, **_NO_DROPOUT)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50, **_BERT, **_NO_DROPOUT)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **_BERT, **_NO_DROPOUT)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **_BERT)),
    "phi3": lambda: transformers.Phi3Model(
        transformers.Phi3Config(vocab_size=50, pad_token_id=0, num_key_value_heads=1, **_BERT)
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=FF, n_positions=8)
    ),
    "bart": lambda: _bart(
        d_model=D,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
    ),
    "vit-5": lambda: nn.Sequential(*(Vit5Block() for _ in range(LAYERS))),
    "timm": lambda: nn.Sequential(*(TimmBlock() for _ in range(LAYERS))),
    "torch": _torch_encoder,
    "torch-pre": lambda: _torch_encoder(norm_first=True),
}


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model in evaluation mode, every parameter training."""
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    for name, p in model.named_parameters():  # norms and biases of their own, or much would go unseen
        if "bias" in name or "norm" in name.lower():
            p.data += 0.1 * torch.randn_like(p)
    return model


def run(model: nn.Module) -> Tensor:
    """The last hidden states of a fixed input of two samples."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    if isinstance(model, transformers.ViTModel):
        return model(torch.randn(2, 3, 8, 8, generator=generator).to(dtype)).last_hidden_state
    if isinstance(model, transformers.PreTrainedModel):
        return model(torch.randint(2, 50, (2, 5), generator=generator)).last_hidden_state
    return model(torch.randn(2, 5, D, generator=generator).to(dtype))


def shaken(model: nn.Module, trained: list[str]) -> nn.Module:
    """The model, with random numbers added to what trains."""
    generator = torch.Generator().manual_seed(2)
    for name in trained:
        p = model.get_parameter(name)
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def branch(adapter: BottleneckAdapter, x: Tensor, act: Callable[[Tensor], Tensor] = nn.functional.relu) -> Tensor:
    """What a bottleneck adapter adds."""
    u = act(x @ adapter.w_down.T + adapter.b_down) @ adapter.w_up.T + adapter.b_up
    return adapter.scale * u


def without_memory(name: str) -> nn.Module:
    """BERT base and large (uncased), BART large and ViT-B/16 as published, on the meta device."""
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        if name == "bert-base":
            return transformers.BertModel(transformers.BertConfig())
        if name == "bert-large":
            return transformers.BertModel(transformers.BertConfig(**large))
        if name == "bart-large":
            return transformers.BartModel(transformers.BartConfig())
        return transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
