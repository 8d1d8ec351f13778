"""`petl_kernels.two_stage.score_channels` and `score_channels_l2`, over plain modules and transformers' BERT."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, MODELS, TOKENS, D, aligned, batches, loss, make, training
from torch import nn

from petl_kernels.two_stage import score_channels, score_channels_l2

KINDS = list(MODELS)
LINEARS = {"plain": 8, "bert": 12}  # without the head


def per_gate(t, reduction, product):
    """What the three reductions are, from the gradient of a gate [B, d], or from g * a [B, tokens, d]."""
    if reduction == "abs":
        return product.abs().sum((0, 1))
    return t.sum(0).square() if reduction == "sq_batch" else t.square().sum(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("reduction", ["sq_batch", "sq_sample", "abs"])
def test_scores_are_those_of_a_gate_of_ones(kind, side, reduction):
    model = aligned(kind)
    scores = score_channels(model, batches(), loss, side=side, reduction=reduction)
    assert len(scores) == LINEARS[kind] and "head" not in scores
    model.eval()
    for name, score in scores.items():
        expected = 0
        for batch in batches():
            found = {}

            def gate(value, found=found):
                found["gate"] = torch.ones(len(value), 1, value.shape[-1], requires_grad=True)
                found["gated"] = value * found["gate"]
                return found["gated"]

            module = model.get_submodule(name)
            if side == "output":
                handle = module.register_forward_hook(lambda m, args, y, gate=gate: gate(y))
            else:
                handle = module.register_forward_pre_hook(lambda m, args, gate=gate: (gate(args[0]),))
            value = loss(model, batch)
            handle.remove()
            by_gate, g = torch.autograd.grad(value, [found["gate"], found["gated"]])
            expected = expected + per_gate(by_gate.flatten(1), reduction, g * found["gated"])
        assert score.dtype == torch.float32 and score.any()
        torch.testing.assert_close(score, expected.detach(), rtol=1e-4, atol=1e-12)


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return hooks, training(model), [m.training for m in model.modules()], torch.get_rng_state().tolist(), grads


def equal_states(one, other):
    grads = all(a is b is None or torch.equal(a, b) for a, b in zip(one[-1], other[-1]))
    return one[:-1] == other[:-1] and grads


@pytest.mark.parametrize("score", ["taylor", "l2"])
@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_no_trace(score, fails):
    model = aligned().train()
    model.blocks[0].eval()  # modes need not agree
    seen = []

    def run(model, batch):
        torch.rand(3)
        modes = {m.training for m in model.modules()}
        seen.append(weakref.ref(hidden := model(batch[0])))
        assert modes == {False}
        if fails and len(seen) == 2:
            raise KeyError("in the middle")
        return F.cross_entropy(hidden, batch[1])

    before = state_of(model)
    try:
        if score == "taylor":
            score_channels(model, batches(), run)
        else:
            score_channels_l2(model, batches(), run, lambda batch: batch[1], where="blocks.*.proj")
        assert not fails
    except KeyError:
        assert fails
    assert equal_states(state_of(model), before)
    gc.collect()
    assert seen and all(reference() is None for reference in seen)


def test_scores_keep_no_activations():
    model = aligned()
    kept = []

    class Watch(nn.Module):
        def forward(self, value):
            kept.append(weakref.ref(value.untyped_storage()))
            return value

    for block in model.blocks:
        block.up = nn.Sequential(block.up, Watch())
    gc.collect()
    gc.disable()  # reference counts alone have to free them
    try:
        score_channels(model, batches(), loss)
        assert len(kept) == 6 and not any(reference() for reference in kept)
    finally:
        gc.enable()


def test_a_module_used_twice_adds_up():
    class Twice(nn.Module):
        def __init__(self, uses):
            super().__init__()
            torch.manual_seed(0)
            self.shared = nn.Linear(D, D)
            self.copies = nn.ModuleList(copy.deepcopy(self.shared) for _ in range(2))
            self.uses = uses

        def forward(self, value):
            one, two = (self.shared, self.shared) if self.uses == "shared" else self.copies
            return two(one(value).tanh()).square().sum()

    value = torch.randn(4, TOKENS, D)
    scores = {}
    for uses in ("shared", "copies"):
        where = "shared" if uses == "shared" else "copies.*"
        scores[uses] = score_channels(Twice(uses), [value], lambda model, batch: model(batch), where=where)
    assert torch.equal(scores["shared"]["shared"], scores["copies"]["copies.0"] + scores["copies"]["copies.1"])


def test_scores_of_frozen_checkpointed_and_autocast_models():
    expected = score_channels(aligned(), batches(), loss)
    frozen = aligned()
    frozen.requires_grad_(False)
    checkpointed = aligned()
    checkpointed.reentrant = False
    with torch.no_grad():  # scoring turns gradients on by itself
        for scores in (
            score_channels(frozen, batches(), loss, where=list(expected)),
            score_channels(checkpointed, batches(), loss),
        ):
            assert all(torch.equal(score, expected[name]) for name, score in scores.items()) and len(scores) == 8

    def autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    for name, score in score_channels(aligned(), batches(), autocast).items():
        assert score.dtype == torch.float32
        assert F.cosine_similarity(score, expected[name], dim=0) > 0.98, name


def test_reentrant_checkpointing_is_scored_or_refused():
    model = aligned()
    expected = score_channels(model, batches(), loss)
    model.reentrant = True
    with pytest.raises(RuntimeError, match=r"no gradient reached .*blocks.0.qkv.* and 4 more.*use_reentrant=False"):
        score_channels(model, batches(), loss)

    class Front(nn.Module):  # tapped before the first block, so that a gradient is asked for inside of it
        def __init__(self):
            super().__init__()
            self.embed, self.front, self.rest = model.embed, nn.Identity(), model

        def forward(self, ids):
            self.rest.embed = nn.Identity()
            try:
                return self.rest(self.front(self.embed(ids)))
            finally:
                self.rest.embed = self.embed

    names = ["front", *(f"rest.{name}" for name in expected)]
    scores = score_channels(Front(), batches(), loss, where=names)
    assert all(torch.equal(scores[f"rest.{name}"], score) for name, score in expected.items())


def test_where():
    with pytest.raises(ValueError, match=r"^score_channels: no nn.Linear is frozen; give `where`"):
        score_channels(make(), batches(), loss)
    model = aligned()
    by_glob = score_channels(model, batches(), loss, where=["blocks.*.up", "blocks.1.proj"])
    assert list(by_glob) == ["blocks.0.up", "blocks.1.proj", "blocks.1.up"]
    by_predicate = score_channels(model, batches(), loss, where=lambda name, module: isinstance(module, nn.LayerNorm))
    assert list(by_predicate) == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert {len(score) for score in by_predicate.values()} == {D}


def test_scores_of_tuples_and_keywords():
    class Pair(nn.Module):
        def forward(self, *, value, other=None):
            return value * 2, other

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, value):
            return self.pair(value=value)[0].square().sum()

    value = torch.randn(2, 3, D)
    for side, activation, grad in (("output", 2 * value, 4 * value), ("input", value, 8 * value)):
        (score,) = score_channels(Model(), [value], lambda m, b: m(b), where="pair", side=side).values()
        torch.testing.assert_close(score, (activation * grad).sum((0, 1)).square())


BAD_SCORES = {
    "side": (dict(side="both"), ValueError, r"side must be one of \('output', 'input'\), got 'both'"),
    "reduction": (dict(reduction="sum"), ValueError, "reduction must be one of .* got 'sum'"),
    "pattern": (dict(where="layers.*"), ValueError, "where 'layers.\\*' matches nothing"),
    "predicate": (dict(where=lambda *_: False), ValueError, "where picks no module"),
    "no-strings": (dict(where=[nn.Linear]), TypeError, "where must hold names or glob patterns, got type"),
    "model": (dict(model=3), TypeError, "model must be an nn.Module, got int"),
    "no-batches": (dict(batches=[]), RuntimeError, "none of the modules ran"),
    "no-scalar": (dict(loss_fn=lambda m, b: m(b[0])), TypeError, "must return a scalar tensor, got torch.float32"),
    "no-tensor": (dict(loss_fn=lambda m, b: loss(m, b).item()), TypeError, "must return a scalar tensor, got float"),
    "no-run": (dict(loss_fn=lambda m, b: m.head(torch.ones(1, D)).sum()), RuntimeError, "none of the modules ran"),
    "cut": (
        dict(loss_fn=lambda m, b: loss(m, b).detach() + m.blocks[0].proj(torch.ones(1, D)).sum()),
        RuntimeError,
        "no gradient reached 'blocks.0.qkv', .* and 3 more: the loss does not depend on them",
    ),
    "vector": (dict(where="embed", side="input"), TypeError, "input of 'embed' must be a floating-point tensor"),
}


@pytest.mark.parametrize("changed, error, message", BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_scoring(changed, error, message):
    model = aligned()
    before = state_of(model)
    with pytest.raises(error, match=f"^score_channels: .*{message}"):
        score_channels(**dict(model=model, batches=batches(), loss_fn=loss) | changed)
    assert equal_states(state_of(model), before)


def test_a_change_in_place_is_an_error_not_a_wrong_score():
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match=r"in-?place"):
        score_channels(model, [torch.randn(4, D)], lambda m, b: m(b).sum(), where="0")


def test_a_part_of_the_linears_that_did_not_run():
    model = aligned()
    model.spare = nn.Linear(D, D).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no batch went through the forward of 'spare'; narrow `where`"):
        score_channels(model, batches(), loss)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("skip, masked", [(0, False), (1, False), (0, True)])
def test_l2_scores(side, skip, masked):
    model = make()
    data = batches(4)
    mask = torch.arange(TOKENS) < torch.randint(2, TOKENS, (4, 1), generator=torch.Generator().manual_seed(3))
    scores = score_channels_l2(
        model,
        data,
        lambda model, batch: model(batch[0]),
        lambda batch: batch[1],
        where=["blocks.*.norm2", "blocks.*.down"],
        side=side,
        skip_tokens=skip,
        mask_fn=(lambda batch: mask) if masked else None,
    )
    assert list(scores) == ["blocks.0.norm2", "blocks.0.down", "blocks.1.norm2", "blocks.1.down"]
    model.eval()
    for name, score in scores.items():
        features = []
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda m, a, y, f=features: f.append(y if side == "output" else a[0]))
        with torch.no_grad():
            for ids, _ in data:
                model(ids)
        handle.remove()
        stacked, labels = torch.stack(features).double(), torch.stack([label for _, label in data])
        if masked:
            stacked = stacked * mask[None, :, :, None]
        flat = stacked.flatten(0, 1)[:, skip:]
        norms = [torch.linalg.vector_norm(flat[labels.flatten() == c], dim=(0, 1)) for c in range(CLASSES)]
        torch.testing.assert_close(score, torch.stack(norms).mean(0).float())


def test_l2_bad_input():
    def score(**changed):
        call = dict(forward_fn=lambda m, b: m(b[0]), labels_fn=lambda b: b[1], where="blocks.0.up") | changed
        return score_channels_l2(make(), batches(), **call)

    assert score(labels_fn=lambda b: ["a"] * 4).keys() == {"blocks.0.up"}
    with pytest.raises(ValueError, match=r"^score_channels_l2: 3 labels, but 'blocks.0.up' has \[4, 7, 48\]"):
        score(labels_fn=lambda b: b[1][:3])
    with pytest.raises(ValueError, match=r"^score_channels_l2: mask \[4, 6\], but 'blocks.0.up' has"):
        score(mask_fn=lambda b: torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^score_channels_l2: side must be"):
        score(side="left")
    with pytest.raises(ValueError, match=r"^score_channels_l2: skip_tokens must be an integer of at least 0, got -1"):
        score(skip_tokens=-1)
    with pytest.raises(RuntimeError, match=r"^score_channels_l2: none of the modules ran"):
        score(forward_fn=lambda m, b: None)
