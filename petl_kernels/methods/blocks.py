"""Where the parts of a transformer block are: its sub-layers' outputs, their inputs and their linears, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Attention:
    """Modules of one attention sub-layer.

    Attributes:
        branch: whose output is the sub-layer's, before it is added to the residual.
        core: that computes the heads; its first argument is the sub-layer's input, and `query` or `qkv` are within it.
        query, key, value, output: its linears, None where it has no such linear that is called: `qkv` is one for all
            three, in this order, and nn.MultiheadAttention reads its weights without calling any.
    """

    branch: str
    core: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    output: str | None = None
    qkv: str | None = None


@dataclass(frozen=True)
class FeedForward:
    """Modules of the feed-forward sub-layer.

    Attributes:
        branch: as of `Attention`.
        input: whose first argument is the sub-layer's input.
        down: the linear back to the model's width.
    """

    branch: str
    input: str
    down: str


@dataclass(frozen=True)
class Block:
    """A transformer block; names are the model's once `find_blocks` has found one.

    Attributes:
        name: of the block itself.
        attentions, feed_forward: its sub-layers.
        norm: the layer norm that the block ends with, in a post-LN block; None in a pre-LN one.
        stream: in a pre-LN block the module whose first argument is the residual stream between the sub-layers.
        width: d, of the residual stream.
    """

    attentions: tuple[Attention, ...]
    feed_forward: FeedForward
    norm: str | None = None
    stream: str | None = None
    name: str = ""
    width: int = 0

    @property
    def branches(self) -> list[str]:
        """Of all sub-layers."""
        return [*(attention.branch for attention in self.attentions), self.feed_forward.branch]


def _bart(*attentions: str) -> Block:
    found = tuple(
        Attention(f"{a}.out_proj", a, f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj", f"{a}.out_proj") for a in attentions
    )
    return Block(found, FeedForward("fc2", "fc1", "fc2"))


# Dropout is part of a branch where it is a module; BART's is a function, and acts on what is added there too, as in the
# code of He et al. Their norms are read off the class: mBART names its modules alike and normalises first.
_BERT = Block(
    (
        Attention(
            "attention.output.dropout",
            "attention.self",
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
    ),
    FeedForward("output.dropout", "intermediate", "output.dense"),
    norm="output.LayerNorm",
)
_VIT = Block(
    (
        Attention(
            "attention.output.dropout",
            "attention.attention",
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ),
    ),
    FeedForward("output.dropout", "intermediate", "output.dense"),
    stream="layernorm_after",
)
# That of transformers 5, whose dropout is one module for both branches.
_VIT_5 = Block(
    (
        Attention(
            "attention.o_proj",
            "attention",
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
        ),
    ),
    FeedForward("mlp", "mlp", "mlp.fc2"),
    stream="layernorm_after",
)
_LLAMA = Block(
    (
        Attention(
            "self_attn.o_proj",
            "self_attn",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
    ),
    FeedForward("mlp", "mlp", "mlp.down_proj"),
    stream="post_attention_layernorm",
)
# Phi-3 is named as Llama, with one linear for queries, keys and values.
_PHI = Block(
    (Attention("resid_attn_dropout", "self_attn", output="self_attn.o_proj", qkv="self_attn.qkv_proj"),),
    FeedForward("resid_mlp_dropout", "mlp", "mlp.down_proj"),
    stream="post_attention_layernorm",
)
_GPT2 = Block(
    (Attention("attn.resid_dropout", "attn", output="attn.c_proj", qkv="attn.c_attn"),),
    FeedForward("mlp", "mlp", "mlp.c_proj"),
    stream="ln_2",
)
_TIMM = Block(
    (Attention("attn", "attn", output="attn.proj", qkv="attn.qkv"),),
    FeedForward("mlp", "mlp", "mlp.fc2"),
    stream="norm2",
)
# Of petl_kernels.testing.models: layer norms behind the sub-layers, and in front of them.
_OWN = Block(
    (
        Attention(
            "after_attention",
            "attention",
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
        ),
    ),
    FeedForward("after_ffn", "up", "down"),
    norm="norm_after_ffn",
)
_OWN_PRE = replace(_OWN, norm=None, stream="norm_before_ffn")
_TORCH = Block((Attention("dropout1", "self_attn"),), FeedForward("dropout2", "linear1", "linear2"), norm="norm2")
_BARTS = (_bart("self_attn", "encoder_attn"), _bart("self_attn"))
_KNOWN = (_BERT, _VIT, _VIT_5, _LLAMA, *_BARTS, _TIMM, _PHI, _GPT2, _OWN, _OWN_PRE)


def find_blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks of a model, in its order: BERT, RoBERTa, ViT, Llama, Phi-3, GPT-2 and BART of
    `transformers` and what is named like them, `timm`'s ViT, and nn.TransformerEncoderLayer."""
    return [block for name, module in model.named_modules() for block in _recognise(name, module)]


def _recognise(name: str, module: nn.Module) -> Iterator[Block]:
    known = next((block for block in _candidates(module) if all(_child(module, path) for path in _paths(block))), None)
    if known is None:
        return
    down: Any = _child(module, known.feed_forward.down)
    width = getattr(down, "out_features", getattr(down, "nf", None))  # nf: of GPT-2's Conv1D
    if width is None:
        return
    prefix = f"{name}." if name else ""

    def full(part: Any) -> Any:
        return replace(part, **{key: prefix + path for key, path in vars(part).items() if path is not None})

    yield Block(
        tuple(full(attention) for attention in known.attentions),
        full(known.feed_forward),
        known.norm and prefix + known.norm,
        known.stream and prefix + known.stream,
        name,
        width,
    )


def _candidates(module: nn.Module) -> tuple[Block, ...]:
    if isinstance(module, nn.TransformerEncoderLayer):
        return (replace(_TORCH, norm=None, stream="norm2") if module.norm_first else _TORCH,)
    if type(module).__name__ in ("BartEncoderLayer", "BartDecoderLayer"):
        return tuple(replace(block, norm="final_layer_norm") for block in _KNOWN)
    return _KNOWN


def _paths(block: Block) -> list[str]:
    parts = [vars(part).values() for part in (*block.attentions, block.feed_forward)]
    return [path for part in [*parts, (block.norm, block.stream)] for path in part if path is not None]


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split("."):
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    return found
