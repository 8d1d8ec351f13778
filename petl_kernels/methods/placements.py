"""Where each method puts its modules in a block: functions `(model, block, **options) -> insertions`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from petl_kernels._names import match
from petl_kernels.methods.attention import Inside, OnHeads
from petl_kernels.methods.blocks import Attention, Block
from petl_kernels.methods.insertions import After, Around, Beside, Insertion, Instead
from petl_kernels.nn import (
    AdapterPlus,
    AdaptFormer,
    BottleneckAdapter,
    ChannelAdapter,
    DiffPruningLinear,
    IA3Linear,
    IA3MultiheadAttention,
    LoRALinear,
    LoRAMergedLinear,
    LoRAMultiheadAttention,
    LowRankPAL,
    MultiHeadParallelAdapter,
    ParallelAdapter,
    PrefixAdapter,
)
from petl_kernels.nn.lora_merged import is_conv1d
from petl_kernels.nn.multihead_attention import TARGETS, obstacle

Insertions = Iterator[Insertion]


def houlsby(model: nn.Module, block: Block, *, bottleneck: int = 64, **options: Any) -> Insertions:
    """Behind every sub-layer, before its residual sum."""
    for branch in block.branches:
        adapter = BottleneckAdapter(block.width, bottleneck, **{"activation": "gelu_tanh", **options})
        yield After(branch, _like(model, block, adapter))


def pfeiffer(model: nn.Module, block: Block, *, bottleneck: int = 48, **options: Any) -> Insertions:
    """At the layer norm behind the feed-forward part, or, in a pre-LN block, behind that part."""
    options = {"scale": 1.0, "activation": "relu", "init": "bert", **options}
    if block.norm is None:
        adapter = BottleneckAdapter(block.width, bottleneck, **options)
        yield After(block.feed_forward.branch, _like(model, block, adapter))
    else:  # the branch alone: `Around` applies the norm
        yield Around(block.norm, _like(model, block, ParallelAdapter(block.width, bottleneck, **options)))


def parallel(model: nn.Module, block: Block, *, bottleneck: int = 512, **options: Any) -> Insertions:
    """Beside the feed-forward part, from its input."""
    yield _beside(model, block, block.feed_forward.input, ParallelAdapter(block.width, bottleneck, **options))


def adaptformer(model: nn.Module, block: Block, *, bottleneck: int = 64, **options: Any) -> Insertions:
    """Beside the feed-forward part and its layer norm, from the residual stream."""
    if block.stream is None:
        raise ValueError(f"attach: adaptformer reads the stream before a norm, and {block.name!r} is a post-LN block")
    yield _beside(model, block, block.stream, AdaptFormer(block.width, bottleneck, **options))


def adapter_plus(model: nn.Module, block: Block, *, bottleneck: int = 8, **options: Any) -> Insertions:
    """Behind the whole block, on the residual stream."""
    yield After(block.name, _like(model, block, AdapterPlus(block.width, bottleneck, **options)))


def low_rank_pal(model: nn.Module, block: Block, *, bottleneck: int = 100, **options: Any) -> Insertions:
    """Beside the whole block, from its input."""
    yield _beside(model, block, block.name, LowRankPAL(block.width, bottleneck, **options))


def lora(
    model: nn.Module, block: Block, *, rank: int = 8, targets: Sequence[str] = ("query", "value"), **options: Any
) -> Insertions:
    """On linears of every attention; where one linear is for queries, keys and values, on slices of its output."""
    for attention in block.attentions:
        rest = [t for t in targets if t not in TARGETS or not _stacked(attention)]
        if sliced := [t for t in targets if t not in rest]:
            module: Any
            if attention.qkv is not None:
                slices = _slices(model, attention, sliced)
                module = LoRAMergedLinear.from_linear(_linear(model, attention.qkv), rank, slices, **options)
            else:
                module = LoRAMultiheadAttention.from_attention(_linear(model, attention.core), rank, sliced, **options)
            yield Instead(attention.qkv or attention.core, module)
        for target in rest:
            name = _named(block, attention, target, "lora")
            yield Instead(name, LoRALinear.from_linear(_linear(model, name), rank, **options))


def ia3(model: nn.Module, block: Block, **options: Any) -> Insertions:
    """On keys and values of every attention, and on what the feed-forward part's last linear reads."""
    for attention in block.attentions:
        if attention.qkv is not None:
            slices, qkv = _slices(model, attention, ("key", "value")), _linear(model, attention.qkv)
            yield Instead(attention.qkv, IA3Linear.from_linear(qkv, side="output", slices=slices, **options))
        elif _stacked(attention):
            module = IA3MultiheadAttention.from_attention(_linear(model, attention.core), **options)
            yield Instead(attention.core, module)
        else:
            for target in ("key", "value"):
                name = _named(block, attention, target, "ia3")
                yield Instead(name, IA3Linear.from_linear(_linear(model, name), side="output", **options))
    down = block.feed_forward.down
    yield Instead(down, IA3Linear.from_linear(_linear(model, down), side="input", **options))


def prefix(
    model: nn.Module, block: Block, *, length: int = 30, reparametrization: int | None = None, **options: Any
) -> Insertions:
    """Before keys and values of every attention. `reparametrization`: see `PrefixAdapter`; He et al. train with 800."""
    for attention in block.attentions:
        core: Any = model.get_submodule(attention.core)
        _check_function(model, block, core)
        heads, groups = _heads(block, core), getattr(core, "num_key_value_groups", 1)
        width = _width(model, block, attention, "key")
        adapter = PrefixAdapter(
            width, heads // groups, length, groups=groups, reparametrization=reparametrization, **options
        )
        yield Inside(attention.core, _like(model, block, adapter))


def multi_head_parallel(model: nn.Module, block: Block, *, bottleneck: int = 30, **options: Any) -> Insertions:
    """Beside the heads of every attention, before its output projection."""
    for attention in block.attentions:
        heads = _heads(block, model.get_submodule(attention.core))
        if (width := _width(model, block, attention, "query")) != block.width:
            words = f"{attention.query or attention.qkv!r} makes {width} of {block.width}"
            raise ValueError(f"attach: multi_head_parallel wants queries as wide as the model, and {words}")
        adapter = MultiHeadParallelAdapter(block.width, heads, bottleneck, **options)
        places = attention.query, attention.qkv, attention.output
        yield OnHeads(attention.core, _like(model, block, adapter), *places)


def mam(
    model: nn.Module,
    block: Block,
    *,
    prefix_length: int = 30,
    reparametrization: int | None = None,
    prefix_dropout: float = 0.0,
    bottleneck: int = 512,
    scale: float | str = 4.0,
    **options: Any,
) -> Insertions:
    """`prefix` and `parallel`, by the names of `nn.MAM`."""
    yield from prefix(model, block, length=prefix_length, reparametrization=reparametrization, dropout=prefix_dropout)
    yield from parallel(model, block, bottleneck=bottleneck, scale=scale, **options)


def sct(
    model: nn.Module,
    block: Block,
    *,
    k: int | None = None,
    channels: Mapping[str, Tensor | Sequence[int]] | None = None,
    **options: Any,
) -> Insertions:
    """On the residual stream behind attention. `channels` maps blocks to their channels, as `two_stage.select` does."""
    if block.stream is None:
        raise ValueError(f"attach: sct acts on the stream before a norm, and {block.name!r} is a post-LN block")
    if channels is None and k is None:
        raise ValueError("attach: sct needs channels, block name -> indices, or k for the first k of each block")
    chosen = range(k or 0) if channels is None else channels[block.name]
    adapter = _OnStream(ChannelAdapter(block.width, chosen, **options))
    yield Beside(block.attentions[0].branch, _like(model, block, adapter), block.name)


def diff_pruning(model: nn.Module, block: Block, *, targets: str | Sequence[str] = "*", **options: Any) -> Insertions:
    """On all linears of the block, or those that `targets` match by their names in it."""
    module = model.get_submodule(block.name)
    if isinstance(module, nn.TransformerEncoderLayer):  # nothing there may be replaced: its fast path reads weights
        raise ValueError(
            f"attach: diff_pruning replaces linears, and {block.name!r} reads weights without calling them"
        )
    found = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not found:
        raise ValueError(f"attach: diff_pruning wants an nn.Linear, and {block.name!r} has none")
    for name in match("attach", "targets", targets, found):
        full = f"{block.name}.{name}" if block.name else name
        yield Instead(full, DiffPruningLinear.from_linear(_linear(model, full), **options))


def nothing(model: nn.Module, block: Block) -> Insertions:
    """Of methods that train what is there."""
    yield from ()


class _OnStream(nn.Module):
    """A module of the residual stream at a place that sees only what is added to it: `adapter(x + branch) - x`.

    Two passes more, and one rounding, than a model that calls the adapter itself.
    """

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.adapter(x + branch) - x


def _beside(model: nn.Module, block: Block, start: str, adapter: nn.Module) -> Beside:
    return Beside(block.feed_forward.branch, _like(model, block, adapter), start)


def _like(model: nn.Module, block: Block, module: nn.Module) -> nn.Module:
    """The module on the device and in the dtype of the block."""
    weight = model.get_parameter(f"{block.feed_forward.down}.weight")
    return module.to(device=weight.device, dtype=weight.dtype)


def _heads(block: Block, core: Any) -> int:
    """The number of an attention's (query) heads."""
    for owner, name in ((core, "num_heads"), (core, "num_attention_heads"), (_config(core), "num_attention_heads")):
        if isinstance(heads := getattr(owner, name, None), int):
            return heads
    raise ValueError(f"attach: {type(core).__name__}, the attention in {block.name!r}, tells no number of heads")


def _check_function(model: nn.Module, block: Block, core: Any) -> None:
    """That an attention calls F.scaled_dot_product_attention, as far as can be told before it runs."""
    runs = getattr(_config(core) or _config(model), "_attn_implementation", None)
    found = None
    if runs not in (None, "sdpa"):
        found = f"runs {runs!r}; load the model with attn_implementation='sdpa'"
    elif not getattr(core, "fused_attn", True):
        found = "has fused_attn off"
    elif isinstance(core, nn.MultiheadAttention):
        found = obstacle(core)
    if found is not None:
        where = f"the attention in {block.name!r} {found}"
        raise ValueError(f"attach: prefixes act within F.scaled_dot_product_attention, and {where}")


def _config(module: Any) -> Any:
    return getattr(module, "config", None)


def _linear(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _named(block: Block, attention: Attention, target: str, method: str) -> str:
    """The name of a linear of an attention."""
    name = getattr(attention, target, None)
    if name is None:
        has = [t for t in (*TARGETS, "output", "qkv") if getattr(attention, t)]
        where = f"the attention in {block.name!r}, which has {has}"
        raise ValueError(f"attach: {method} wants a linear {target!r} of {where}")
    return name


def _stacked(attention: Attention) -> bool:
    """Whether one matrix makes its queries, keys and values."""
    return attention.query is None


def _slices(model: nn.Module, attention: Attention, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Where in the output of `qkv` these are: the output linear reads as much as there is of queries, and of keys and
    values there may be less (grouped queries)."""
    assert attention.qkv is not None and attention.output is not None  # no block of ours is without
    total, queries = _sides(_linear(model, attention.qkv))[1], _sides(_linear(model, attention.output))[0]
    rest = (total - queries) // 2
    bounds = (0, queries, queries + rest, total)
    return [(bounds[i], bounds[i + 1]) for i in map(TARGETS.index, targets)]


def _width(model: nn.Module, block: Block, attention: Attention, target: str) -> int:
    """How wide an attention's queries or keys are."""
    if attention.qkv is not None:
        [(start, stop)] = _slices(model, attention, [target])
        return stop - start
    name = getattr(attention, target)
    return block.width if name is None else _sides(_linear(model, name))[1]  # None: of nn.MultiheadAttention


def _sides(linear: Any) -> tuple[int, int]:
    """d_in and d_out."""
    d_in, d_out = linear.weight.shape[:: 1 if is_conv1d(linear) else -1]
    return d_in, d_out
