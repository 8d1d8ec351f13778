"""The data, the batches and the two runs of `examples/finetune.py`, on a small random model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
adapters = pytest.importorskip("adapters", exc_type=Exception)
pytest.importorskip("transformers", exc_type=Exception)

import finetune  # noqa: E402
import sentiment  # noqa: E402
import training  # noqa: E402


@pytest.fixture(scope="module")
def sentences():
    return sentiment.read_sentences(sentiment.DATA)


def test_sentences_are_the_movie_reviews(sentences):
    labels = dict(sentences)
    assert len(labels) == len(sentences) == 10566
    assert sum(labels.values()) == 5241
    assert labels["Effective but too tepid biopic"] == 0
    assert labels["If you sometimes like to go to the movies to have fun, Wasabi is a good place to start."] == 1


def test_split_is_fixed_and_disjoint(sentences):
    training, held_out = sentiment.split(sentences, 1000)
    assert len(held_out) == 1000 and len(training) == len(sentences) - 1000
    assert not {text for text, _ in training} & {text for text, _ in held_out}
    assert sentiment.split(sentences, 1000) == (training, held_out)
    assert 0.45 < sum(label for _, label in held_out) / 1000 < 0.55


def test_batches():
    examples = [(list(range(1, 2 + i % 30)), i % 2) for i in range(200)]
    batches = list(sentiment.training_batches(examples, size=8, steps=30, seed=3))
    again = list(sentiment.training_batches(examples, size=8, steps=30, seed=3))
    other = list(sentiment.training_batches(examples, size=8, steps=30, seed=4))
    assert len(batches) == 30 and all(len(b["labels"]) == 8 for b in batches)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, again) for k in a)
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(batches, other))
    for batch in batches:
        assert batch["attention_mask"][:, 0].all() and batch["attention_mask"].any(0).all()
        assert torch.equal(batch["input_ids"] > 0, batch["attention_mask"] > 0)
    real, padded = (sum(b["attention_mask"].sum() for b in batches), sum(b["attention_mask"].numel() for b in batches))
    assert real / padded > 0.8


def test_every_sentence_is_seen_once_per_epoch():
    examples = [([i + 1], 0) for i in range(64)]
    batches = sentiment.training_batches(examples, size=8, steps=8, seed=0)
    assert sorted(int(i) for b in batches for i in b["input_ids"].flatten()) == list(range(1, 65))


def test_tokenize_cuts_and_keeps_labels(model_folder):
    tokenizer, _ = sentiment.load(model_folder)
    examples = sentiment.tokenize(tokenizer, [("ab c", 1), ("a " * 200, 0)])
    assert [label for _, label in examples] == [1, 0]
    assert len(examples[0][0]) == 5 and len(examples[1][0]) == sentiment.MAX_TOKENS


def test_only_adapters_and_head_train(model_folder):
    _, encoder = sentiment.load(model_folder)
    model = finetune.with_adapters(encoder, seed=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 4 + 2 and all("adapters.movies" in n or "head" in n for n in trainable)
    batch = sentiment.collate([([2, 5, 6, 3], 1), ([2, 7, 3], 0)])
    before = copy.deepcopy(model.state_dict())
    losses = finetune.train(model, [batch] * 20, lr=1e-2, seed=0, advance=lambda: None)
    assert losses[-1] < losses[0] / 2
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == trainable
    assert training.accuracy(model, sentiment.evaluation_batches([([2, 5, 6, 3], 1), ([2, 7, 3], 0)])) == 1.0


def test_the_whole_program(model_folder, tmp_path, monkeypatch):
    sentences = sentiment.read_sentences(sentiment.DATA)
    monkeypatch.setattr(finetune, "HELD_OUT", 100)
    monkeypatch.setattr(finetune, "read_sentences", lambda path: sentences[:300])
    done = CliRunner().invoke(_app(), ["--steps", "2", "--model", str(model_folder), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for text in ("held-out accuracy", "tokens/s", "launches per step", "4 modules fused, 0 not"):
        assert text in done.output
    record = json.loads((tmp_path / "finetune.json").read_text())
    eager, fused = record["runs"]["eager"], record["runs"]["fused"]
    assert eager["losses"] == pytest.approx(fused["losses"], rel=1e-4) and len(record["fused_modules"]) == 4
    assert fused["launches"] <= eager["launches"] and 0 < fused["saved_mib"] <= eager["saved_mib"]
    assert 0 < eager["adapter_share"] < 1
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there():
    done = CliRunner().invoke(_app(), ["--model", "/nowhere"])
    assert done.exit_code != 0


def _app():
    import typer

    app = typer.Typer()
    app.command()(finetune.main)
    return app


def _result(accuracy: float):
    return finetune.Result([0.5], accuracy, 1.0)


def test_verdict():
    fused = finetune.FuseReport(fused={"a": "sequential"})

    def wrong(eager, ours, steps, report=fused):
        return finetune.verdict({"eager": _result(eager), "fused": _result(ours)}, report, steps)

    assert wrong(0.83, 0.82, finetune.DEFAULT_STEPS) == [] and wrong(0.5, 0.5, 5) == []
    assert "differ by more than a point" in wrong(0.84, 0.828, finetune.DEFAULT_STEPS)[0]
    assert "79.0% only" in wrong(0.8, 0.79, finetune.DEFAULT_STEPS)[0]
    assert "nothing was fused" in wrong(0.8, 0.8, 5, finetune.FuseReport())[0]
