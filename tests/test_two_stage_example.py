"""`examples/two_stage.py` on a small random BERT and on digits: methods, files, swap, outputs and what fails a run."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
pytest.importorskip("transformers", exc_type=Exception)

from safetensors.torch import load_file

import comparison
import methods
import sentiment
import training
import two_stage
import vision
from petl_kernels import two_stage as tasks


@pytest.fixture(scope="module")
def sentences():
    return {domain: sentiment.read_sentences(sentiment.DATA, domain)[:160] for domain in sentiment.DOMAINS}


@pytest.fixture(autouse=True)
def small(monkeypatch, sentences):
    """Few sentences, few held-out examples, few seeds, a small ViT."""
    monkeypatch.setattr(sentiment, "read_sentences", lambda path, domain: sentences[domain])
    monkeypatch.setattr(two_stage, "HELD_OUT", 64)
    monkeypatch.setattr(two_stage, "VALIDATION", 32)
    monkeypatch.setattr(two_stage, "SCORING", 2)
    monkeypatch.setattr(two_stage, "SEEDS", 2)
    monkeypatch.setattr(comparison, "PROBES", 2)
    monkeypatch.setattr(vision, "DEPTH", 2)


@pytest.fixture
def problem(model_folder):
    return next(two_stage.text_problems(4, 0, model_folder, validation=False))


@pytest.fixture
def digits():
    return next(two_stage.vision_problems(4, 0, 1, validation=False))


def _app():
    app = typer.Typer()
    app.command()(two_stage.main)
    return app


def _fit(problem, name, rate=1e-2):
    fitted = methods.Fitted(copy.deepcopy(problem.model))
    stages = methods.METHODS[name]
    methods.fit(fitted, stages, problem, (rate,) * len(stages), rate, 0, lambda: None)
    return fitted


# Of the small BERT (d = 32, feed-forward 32) and the ViT (d = 96, feed-forward 4 d): 2 blocks and 5 layer norms each.
BERT_COUNTS = {
    "head only": 0,
    "LayerNorm": 5 * 2 * 32,
    "SCT": 2 * (4 * 4 + 4),
    "two-stage": 5 * 2 * 32 + 2 * 6 * 4 * 32,
    "Houlsby": 5 * 2 * 32 + 4 * (2 * 32 * 4 + 32 + 4),
}
VIT_COUNTS = {
    "head only": 0,
    "LayerNorm": 5 * 2 * 96,
    "SCT": 2 * (12 * 12 + 12),
    "two-stage": 5 * 2 * 96 + 2 * (12 * (288 + 96 + 384) + 48 * 96),
    "Houlsby": 5 * 2 * 96 + 4 * (2 * 96 * 12 + 96 + 12),
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_what_a_method_trains(problem, digits, name):
    for task, head, counts in (problem, 2 * 32 + 2, BERT_COUNTS), (digits, 5 * 96 + 5, VIT_COUNTS):
        before = copy.deepcopy(task.model.state_dict())
        fitted = _fit(task, name)
        everything = sum(p.numel() for n, p in task.model.named_parameters() if "pooler" not in n) - head
        assert fitted.parameters(head=False) == counts.get(name, everything)
        assert fitted.parameters(head=True) - fitted.parameters(head=False) == head
        assert len(fitted.losses) == 4 and all(map(math.isfinite, fitted.losses))
        after = fitted.model.state_dict()
        changed = {n for n, t in before.items() if n in after and not torch.equal(after[n], t)}
        if name == "two-stage":
            assert changed >= {n for n in fitted.trained if n in before}
        else:
            assert changed <= set(fitted.trained)
        # What the problem holds is the pretrained model, for the next method.
        assert all(torch.equal(t, before[n]) for n, t in task.model.state_dict().items())


def test_sct_sits_on_the_residual_stream_and_takes_the_channels_of_largest_norm(digits):
    fitted = _fit(digits, "SCT", rate=0.0)
    features = []
    first = digits.model.blocks[0]
    handle = first.norm2.register_forward_pre_hook(lambda module, args: features.append(args[0][:, 1:].detach()))
    digits.model.eval()(**digits.scoring[0])
    handle.remove()
    of_class = [features[0][digits.scoring[0]["labels"] == label].square().sum((0, 1)).sqrt() for label in range(5)]
    wanted = torch.stack(of_class).mean(0).topk(12).indices.sort().values
    adapter = fitted.model.blocks[0].stream[1]
    assert torch.equal(adapter.channels, wanted)


def test_two_stage_learns_and_leaves_the_rest_bit_identical(digits):
    few = [{name: values[:16] for name, values in digits.scoring[0].items()}]
    task = methods.Problem("x", digits.model, digits.backbone, few * 200, few, few)
    fitted = _fit(task, "two-stage", rate=1e-2)
    assert fitted.losses[-1] < fitted.losses[0] / 2
    tasks.merge_channels(fitted.model)
    old, new = digits.model.state_dict(), fitted.model.state_dict()
    for name, weight in old.items():
        if name.startswith("blocks") and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            columns = (weight != new[name]).any(0).sum()
            assert 0 < columns <= weight.shape[1] // 8
    assert torch.equal(old["patch.weight"], new["patch.weight"]) and torch.equal(old["position"], new["position"])


@pytest.mark.parametrize("name", methods.METHODS)
def test_files_hold_what_was_trained(problem, tmp_path, name):
    fitted = _fit(problem, name)
    path = tmp_path / "task.safetensors"
    assert methods.save(path, fitted, problem) == path.stat().st_size
    stored = load_file(path)
    elements = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert elements == fitted.parameters(head=True)
    if name in ("SCT", "two-stage"):
        assert sum(n.endswith("channels") for n in stored) == (2 if name == "SCT" else 12)


def test_measuring_changes_no_model(digits, tmp_path):
    results, fits = comparison.compare(digits, two_stage.VISION_RATES, 1e-2, 0, tmp_path, lambda method: None)
    for name, result in results.items():
        assert training.accuracy(fits[name].model, digits.held_out) == result.accuracy
        assert result.step_ms > 0 and result.saved_bytes > 0
    # Two moments of each parameter, and a counter of 4 bytes for each tensor.
    full = results["full"]
    assert full.optimizer_bytes == 8 * full.parameters + 4 * len(fits["full"].trained)
    assert results["head only"].saved_bytes < results["SCT"].saved_bytes < results["full"].saved_bytes


def test_the_whole_program(model_folder, tmp_path):
    arguments = ["--steps", "2", "--model", str(model_folder), "--out", str(tmp_path)]
    done = CliRunner().invoke(_app(), arguments)
    assert done.exit_code == 0, done.output
    for text in (*sentiment.DOMAINS, *methods.METHODS, "step, ms", "optimizer state", "bit-identical", "Ours, because"):
        assert text in done.output
    record = json.loads((tmp_path / "two_stage.json").read_text())
    assert record["swap"] == "bit-identical" and list(record["runs"]) == list(sentiment.DOMAINS)
    for runs in record["runs"].values():
        assert list(runs) == list(methods.METHODS)
        sizes = [runs[name]["file_bytes"] for name in ("head only", "SCT", "LayerNorm", "two-stage", "full")]
        assert sizes == sorted(sizes)
    assert (tmp_path / "two_stage.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_program_on_digits(tmp_path):
    done = CliRunner().invoke(_app(), ["--vision", "--steps", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "two_stage_vision.json").read_text())
    assert list(record["runs"]) == ["seed 0", "seed 1"] and record["swap"] == "bit-identical"
    assert (tmp_path / "two_stage_vision.png").read_bytes().startswith(b"\x89PNG")


def test_tune_judges_validation_examples(monkeypatch):
    monkeypatch.setattr(two_stage, "FACTORS", (1,))
    done = CliRunner().invoke(_app(), ["--vision", "--steps", "2", "--tune"])
    assert done.exit_code == 0 and "Validation accuracy" in done.output
    training_part, judged = [
        {tuple(row.flatten().tolist()) for batch in batches for row in batch["patches"]}
        for problem in two_stage.vision_problems(2, 0, 1, validation=True)
        for batches in (problem.batches + problem.scoring, problem.held_out)
    ]
    (problem,) = two_stage.vision_problems(2, 0, 1, validation=False)
    held_out = {tuple(row.flatten().tolist()) for row in problem.held_out[0]["patches"]}
    assert len(judged) == two_stage.VALIDATION_DIGITS
    assert not judged & training_part and not held_out & training_part and not held_out & judged


def test_swap_reports_what_differs(digits, tmp_path):
    fitted = _fit(digits, "two-stage")
    path = tmp_path / "task.safetensors"
    methods.save(path, fitted, digits)
    batch = digits.held_out[0]
    fresh = two_stage.logits(fitted.model, batch)
    assert two_stage.swap(digits.model, {"a": path}, {"a": fresh}, batch) == []
    nudged = torch.nextafter(fresh, fresh + 1)
    assert "not those of the trained model" in two_stage.swap(digits.model, {"a": path}, {"a": nudged}, batch)[0]


def test_patches_are_those_of_the_image():
    patches, labels = vision.digits(5, seed=0)
    assert patches.shape == (896, 16, 4) and set(labels.tolist()) == set(range(5))
    from sklearn.datasets import load_digits

    image = torch.arange(64.0).view(1, 8, 8) / 16
    index = (torch.tensor(load_digits().target) >= 5).nonzero().flatten()
    order = torch.randperm(896, generator=torch.Generator().manual_seed(0))
    image = torch.tensor(load_digits().images[index[order[0]]], dtype=torch.float32) / 16
    assert torch.equal(patches[0][5], image[2:4, 2:4].flatten())


def _results(**accuracies):
    return {
        "task": {
            name: comparison.Result(accuracies.get(name, 0.8), 2, 1, 10, 4, accuracies.get("losses", [0.5]))
            for name in methods.METHODS
        }
    }


def test_verdict():
    assert comparison.verdict(_results(), judge_accuracy=True) == []
    assert "far below" in comparison.verdict(_results(full=0.7), judge_accuracy=True)[0]
    assert comparison.verdict(_results(full=0.7), judge_accuracy=False) == []
    assert "the loss became nan" in comparison.verdict(_results(losses=[0.5, math.nan]), judge_accuracy=False)[0]


def test_a_failed_swap_fails_the_run(monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr(two_stage, "swap", lambda *group: ["tweets: the logits are not those of the trained model"])
    arguments = ["--steps", "2", "--model", str(model_folder), "--out", str(tmp_path)]
    done = CliRunner().invoke(_app(), arguments)
    assert done.exit_code == 1 and "tweets: the logits" in done.output and "bit-identical to" not in done.output
