"""`petl_kernels.two_stage`: layer norms, selection, tuning; over plain modules and transformers' BERT."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import CLASSES, MODELS, D, aligned, batches, bits, logits, loss, make, train, training
from torch import nn

from petl_kernels import two_stage
from petl_kernels.nn import ChannelLinear
from petl_kernels.two_stage import (
    Selection,
    merge_channels,
    score_channels,
    select,
    tune_channels,
    tune_layer_norms,
)

KINDS = list(MODELS)


# Stage 1


@pytest.mark.parametrize("layers, d, norms, count", [(12, 768, 25, 38_400), (24, 1024, 49, 100_352)])
def test_layer_norm_counts_of_bert(layers, d, norms, count):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=d // 64, intermediate_size=4 * d)
    with torch.device("meta"):
        model = BertModel(config)
    names = tune_layer_norms(model)
    assert len(names) == 2 * norms and set(names) == training(model)
    assert sum(model.get_parameter(name).numel() for name in names) == count


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norms_and_head_train_and_nothing_else(kind):
    model = make(kind)
    loss(model, batches()[0]).backward()  # gradients of before must not move what is frozen
    before = bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    names = tune_layer_norms(model, also=["head.*"])
    norms = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")}
    assert set(names) == norms | {"head.weight", "head.bias"} == training(model)
    train(model, 5, optimizer)
    assert {name for name, t in bits(model).items() if not torch.equal(t, before[name])} == set(names)


def test_layer_norms_refused():
    model = make()
    with pytest.raises(ValueError, match=r"also 'classifier.*' matches nothing"):
        tune_layer_norms(model, also="classifier.*")
    assert training(model) == {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match=r"no nn.LayerNorm with parameters"):
        tune_layer_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False)))
    with pytest.raises(TypeError, match=r"must be an nn.Module, got dict"):
        tune_layer_norms({})


# Selection


def test_exact_k_and_stable_ties():
    scores = {"a": torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 1.0]), "b": torch.zeros(8), "c": torch.arange(4.0)}
    chosen = select(scores, 3)
    assert {name: c.tolist() for name, c in chosen.items()} == {"a": [1, 2, 4], "b": [0, 1, 2], "c": [1, 2, 3]}
    assert select(scores, 4)["a"].tolist() == [0, 1, 2, 4]
    assert all(c.dtype == torch.int64 for c in chosen.values())
    many = torch.randint(0, 3, (1000,), generator=torch.Generator().manual_seed(0)).float()
    top = select({"m": many}, 500)["m"].tolist()
    assert top == sorted(sorted(range(1000), key=lambda i: (-many[i].item(), i))[:500])
    fractions = select(scores, 0.5)
    assert {name: len(c) for name, c in fractions.items()} == {"a": 3, "b": 4, "c": 2}
    assert [len(c) for c in select(scores, 0).values()] == [0, 0, 0]
    assert [len(c) for c in select(scores, 1.0).values()] == [6, 8, 4]


def test_global_selection_compares_normalised_layers():
    small = torch.tensor([3.0, 4.0, 0.0])  # 0.6, 0.8 after division by its norm
    large = torch.tensor([500.0, 500.0, 500.0, 500.0])  # 0.5 each
    scores = {"large": large, "small": small, "none": torch.zeros(2)}
    expected = {
        1: ([], [1]),
        2: ([], [0, 1]),
        4: ([0, 1], [0, 1]),
        7: ([0, 1, 2, 3], [0, 1, 2]),
        6: ([0, 1, 2, 3], [0, 1]),
    }
    for k, (of_large, of_small) in expected.items():
        chosen = select(scores, k, per_layer=False)
        assert (chosen["large"].tolist(), chosen["small"].tolist(), chosen["none"].tolist()) == (of_large, of_small, [])
    assert sum(map(len, select(scores, 1 / 3, per_layer=False).values())) == 3


BAD_SELECT = {
    "nan": (dict(scores={"a": torch.tensor([1.0, float("nan")])}), ValueError, "scores of 'a' must be numbers"),
    "inf": (
        dict(scores={"a": torch.tensor([1.0, float("inf")])}, per_layer=False),
        ValueError,
        "scores of 'a' must be finite",
    ),
    "empty": (dict(scores={}), ValueError, "scores are empty"),
    "integers": (dict(scores={"a": torch.ones(3, dtype=torch.long)}), TypeError, "must be a floating-point tensor"),
    "matrix": (dict(scores={"a": torch.ones(3, 3)}), TypeError, "must be a floating-point tensor"),
    "too-many": (dict(k=5), ValueError, "k must be from 0 to the 4 channels of 'a', got 5"),
    "too-many-in-all": (dict(k=5, per_layer=False), ValueError, "the 4 channels of all layers together, got 5"),
    "negative": (dict(k=-1), ValueError, "k must be from 0"),
    "fraction": (dict(k=1.5), ValueError, "a fraction from 0.0 to 1.0, got 1.5"),
    "bool": (dict(k=True), TypeError, "must be an int or a fraction, got bool"),
    "string": (dict(k="96"), TypeError, "must be an int or a fraction, got str"),
}


@pytest.mark.parametrize("changed, error, message", BAD_SELECT.values(), ids=BAD_SELECT)
def test_bad_selections(changed, error, message):
    with pytest.raises(error, match=f"^select: .*{message}"):
        select(**dict(scores={"a": torch.rand(4)}, k=2) | changed)


def test_selection_is_immutable_and_prints():
    indices = torch.tensor([2, 0])
    chosen = Selection({"a": indices}, {"a": 4})
    indices[0] = 3
    chosen["a"][0] = 3
    assert chosen["a"].tolist() == [2, 0] and chosen.widths == {"a": 4}
    with pytest.raises(TypeError):
        chosen["a"] = indices
    assert str(chosen) == "Selection: 2 of 4 channels in 1 modules\n  a: 2 of 4"
    assert copy.deepcopy(chosen) == chosen != Selection({"a": torch.tensor([2, 1])}, {"a": 4})
    for bad, message in [([0, 0], "distinct"), ([4], r"\[0, 4\)"), ([-1], r"\[0, 4\)")]:
        with pytest.raises(ValueError, match=f"Selection 'a': channels must .*{message}"):
            Selection({"a": torch.tensor(bad)}, {"a": 4})
    with pytest.raises(TypeError, match=r"Selection 'a': channels must be int64"):
        Selection({"a": [0, 1]}, {"a": 4})
    with pytest.raises(ValueError, match=r"must name the same modules"):
        Selection({"a": torch.tensor([1])}, {"b": 4})


# Stage 2


def chosen_of(model, k=4, side="output"):
    return select(score_channels(model, batches(), loss, side=side), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_hundred_steps_move_only_the_selection(kind, dim):
    model = aligned(kind)
    chosen = chosen_of(model, side=("output", "input")[dim])
    before, plain = bits(model), {name: copy.deepcopy(model.get_submodule(name)) for name in chosen}
    tuned = tune_channels(model, chosen, dim=dim, keep_trainable="head.*")
    assert set(tuned.tuned) == set(chosen) and set(tuned.trained) == training(model)
    expected = {"head.weight", "head.bias"} | {f"{name}.channel_weight" for name in chosen}
    if dim == 0:
        expected |= {f"{name}.channel_bias" for name in chosen if plain[name].bias is not None}
    assert training(model) == expected
    # All parameters are given to the optimizer: only those with a gradient may move, whatever decays.
    train(model, 100, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    after = bits(model)
    for name, linear in plain.items():
        mask = torch.zeros_like(linear.weight, dtype=torch.bool).index_fill(dim, chosen[name], True)
        moved = after[f"{name}.weight"] != before[f"{name}.weight"]
        assert not moved[~mask].any() and moved[mask].float().mean() > 0.99
        if linear.bias is not None:
            rows = (after[f"{name}.bias"] != before[f"{name}.bias"]).nonzero().flatten()
            assert set(rows.tolist()) == (set(chosen[name].tolist()) if dim == 0 else set())
    others = [n for n in before if not n.startswith(tuple(f"{name}." for name in chosen)) and not n.startswith("head")]
    assert others and all(torch.equal(after[n], before[n]) for n in others)

    expected_logits = logits(model)
    assert merge_channels(model) == list(chosen)
    assert torch.equal(logits(model), expected_logits)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in chosen)


def test_undo():
    model = aligned()
    before, trained, linears = bits(model), training(model), dict(model.named_modules())
    expected = logits(model)
    tuned = tune_channels(model, chosen_of(model))
    train(model, 5)
    assert not torch.equal(logits(model), expected)
    tuned.undo()
    assert torch.equal(logits(model), expected) and training(model) == trained
    assert all(torch.equal(t, before[name]) for name, t in bits(model).items())
    assert dict(model.named_modules()) == linears
    with pytest.raises(RuntimeError, match=r"no longer stands at 'blocks.0.qkv'"):
        tuned.undo()
    again = tune_channels(model, chosen_of(model))
    merge_channels(model)
    with pytest.raises(RuntimeError, match=r"no longer stands"):
        again.undo()


def test_what_keeps_training():
    options = {
        "nothing": (False, set()),
        "as before": (True, {"blocks.0.norm1.weight", "norm.bias", "head.weight"}),
        "patterns": (["head.*", "blocks.1.norm*"], {"head.weight", "blocks.1.norm2.bias"}),
    }
    for keep, some in options.values():
        model = aligned()
        trained = training(model)
        tuned = tune_channels(model, chosen_of(model), keep_trainable=keep)
        rest = {name for name in training(model) if "channel_" not in name}
        assert some <= rest and (some or not rest) and set(tuned.frozen) == trained - rest
        assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train" in str(tuned)
        assert ("save_task include=" in str(tuned)) == bool(tuned.frozen)
    model = make()  # of a linear whose own weight trained only the channels do afterwards
    tune_channels(model, Selection({"head": torch.tensor([1])}, {"head": CLASSES}), keep_trainable=True)
    assert not model.head.weight.requires_grad and {"head.channel_weight", "embed.weight"} <= training(model)


def test_shared_modules_and_empty_selections():
    model = aligned()
    model.alias = model.blocks[0].up
    chosen = Selection(
        {"blocks.0.up": torch.tensor([3, 1]), "blocks.1.up": torch.tensor([], dtype=torch.long)},
        {"blocks.0.up": 2 * D, "blocks.1.up": 2 * D},
    )
    tuned = tune_channels(model, chosen)
    assert isinstance(model.alias, ChannelLinear) and model.alias is model.blocks[0].up
    assert type(model.blocks[1].up) is nn.Linear and list(tuned.tuned) == ["blocks.0.up"]
    assert model.alias.channels.tolist() == [3, 1]
    assert merge_channels(model) == ["blocks.0.up", "alias"] and model.alias is model.blocks[0].up
    tuned = tune_channels(model, Selection({"alias": torch.tensor([3])}, {"alias": 2 * D}))
    tuned.undo()
    assert type(model.alias) is nn.Linear and model.alias is model.blocks[0].up


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_tuning_under_checkpointing_and_autocast(reentrant):
    def gradients(reentrant, autocast):
        model = aligned()
        tune_channels(model, chosen_of(model), keep_trainable="blocks.0.norm1.*")
        model.eval()
        model.reentrant = reentrant
        if reentrant:  # it needs an input that requires a gradient
            model.embed.register_forward_hook(lambda m, args, y: y.requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, batches()[0])
        value.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    for autocast in (False, True):
        got, expected = gradients(reentrant, autocast), gradients(None, autocast)
        assert got.keys() == expected.keys() and len(got) == 16
        for name, grad in got.items():
            assert grad.any()
            torch.testing.assert_close(grad, expected[name])


def only(name, width, *channels):
    return Selection({name: torch.tensor(channels)}, {name: width})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, D), nn.LayerNorm(D), nn.Linear(D, 5)
        self.head.weight = self.embed.weight


def hooked():
    model = aligned()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    return model


def already():
    model = aligned()
    tune_channels(model, only("blocks.0.up", 2 * D, 1))
    return model


BAD_TUNING = {
    "gone": (make, only("blocks.2.up", 2 * D, 1), {}, "'blocks.2.up' is not a module inside of the model"),
    "size": (make, only("blocks.0.up", D, 1), {}, "'blocks.0.up' has 48 channels in dim 0, .* made of 24"),
    "other-dim": (make, only("blocks.0.up", 2 * D, 1), dict(dim=1), "'blocks.0.up' has 24 channels in dim 1"),
    "no-linear": (make, only("norm", D, 1), {}, "'norm' cannot be tuned: .* got LayerNorm"),
    "second-is-bad": (
        make,
        Selection({"head": torch.tensor([1]), "norm": torch.tensor([1])}, {"head": CLASSES, "norm": D}),
        {},
        "'norm' cannot be tuned",
    ),
    "tied": (Tied, only("head", 5, 1), {}, "'head' shares its weight or bias with another module"),
    "hooks": (hooked, only("blocks.0.up", 2 * D, 1), {}, "'blocks.0.up' has hooks"),
    "already": (already, only("blocks.0.up", 2 * D, 1), {}, "is a ChannelLinear already; merge_channels first"),
    "attention": (
        lambda: nn.MultiheadAttention(D, 2),
        only("out_proj", D, 1),
        {},
        "'out_proj' belongs to an nn.MultiheadAttention, which reads its weight without calling it",
    ),
    "layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(D, 2)),
        only("0.linear1", 2048, 1),
        {},
        "'0.linear1' belongs to an nn.TransformerEncoderLayer",
    ),
    "dim": (make, only("head", CLASSES, 1), dict(dim=2), "dim must be 0 .* got 2"),
    "impl": (make, only("head", CLASSES, 1), dict(impl="fast"), "impl must be one of .* got 'fast'"),
    "keep": (
        make,
        only("head", CLASSES, 1),
        dict(keep_trainable="haed.*"),
        "keep_trainable 'haed.\\*' matches nothing",
    ),
}


@pytest.mark.parametrize("build, chosen, options, message", BAD_TUNING.values(), ids=BAD_TUNING)
def test_bad_tuning(build, chosen, options, message):
    model = build()
    before = list(model.named_modules()), training(model), bits(model)
    with pytest.raises(ValueError, match=f"^tune_channels: .*{message}"):
        tune_channels(model, chosen, **options)
    assert (list(model.named_modules()), training(model)) == before[:2]
    assert all(torch.equal(t, before[2][name]) for name, t in bits(model).items())


def test_other_bad_calls():
    with pytest.raises(TypeError, match=r"selection must be a Selection, got dict"):
        tune_channels(make(), {"head": torch.tensor([1])})
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        tune_channels("model", only("head", CLASSES, 1))
    alone = ChannelLinear.from_linear(nn.Linear(3, 3), [1])
    with pytest.raises(ValueError, match=r"model is itself a ChannelLinear"):
        merge_channels(alone)
    assert merge_channels(make()) == []


def test_public_names():
    assert set(two_stage.__all__) <= set(dir(two_stage))
    assert all(getattr(two_stage, name).__doc__ for name in two_stage.__all__)
