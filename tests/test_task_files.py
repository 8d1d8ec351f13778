"""Task files: what a task changed, saved whole or not at all, put on a frozen backbone and taken off bit for bit."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CLASSES, MODELS, D, batches, bits, logits, loss, make, train
from torch import nn

from petl_kernels.nn import ChannelLinear
from petl_kernels.two_stage import (
    Selection,
    apply_task,
    merge_channels,
    save_task,
    score_channels,
    select,
    task_files,
    tune_channels,
    tune_layer_norms,
)

KINDS = list(MODELS)


def tuned(kind="plain", seed=1, dim=0, k=4, keep="head.*", **options):
    """A model after both stages of a task, and what `tune_channels` reported."""
    model = make(kind, **options)
    tune_layer_norms(model, also="head.*")
    train(model, 3, seed=seed)
    scores = score_channels(model, batches(seed=seed), loss, side=("output", "input")[dim])
    report = tune_channels(model, select(scores, k), dim=dim, keep_trainable=keep)
    train(model, 5, seed=seed)
    return model, report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One task of the plain model: its file and its logits. Nobody changes them."""
    path = tmp_path_factory.mktemp("task") / "task.safetensors"
    model, report = tuned()
    save_task(path, model, include=report.frozen)
    return path, logits(model)


def unchanged(model, before):
    return all(torch.equal(t, before[name]) for name, t in bits(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_four_tasks_swap_on_one_backbone(kind, tmp_path):
    backbone = make(kind).requires_grad_(False)
    before, plain = bits(backbone), logits(backbone)
    expected = {}
    for seed in range(4):
        model, _ = tuned(kind, seed=seed, dim=seed % 2, k=2 + seed)
        path = tmp_path / f"{seed}.safetensors"
        save_task(path, model, backbone=backbone)
        expected[path] = logits(model)
        merge_channels(model)
        assert torch.equal(logits(model), expected[path])
    assert not any(
        torch.equal(one, other)
        for one in expected.values()
        for other in (plain, *expected.values())
        if one is not other
    )
    for _ in range(2):
        for path, values in expected.items():
            with apply_task(backbone, path) as applied:
                assert torch.equal(logits(backbone), values)
                assert applied.changed and not unchanged(backbone, before)
            assert unchanged(backbone, before) and torch.equal(logits(backbone), plain)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_in_the_file(dim, tmp_path):
    model, report = tuned(dim=dim)
    path = tmp_path / "task.safetensors"
    changed = save_task(path, model, include=report.frozen)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ChannelLinear)}
    rows = {f"{name}.weight" for name in layers} | {
        f"{name}.bias" for name, m in layers.items() if m.channel_bias is not None
    }
    norms = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")}
    assert set(changed) == rows | norms | {"head.weight", "head.bias"}
    content = load_file(path)
    assert set(content) == set(changed) | {f"{name}/channels" for name in rows}
    for name, layer in layers.items():
        assert torch.equal(content[f"{name}.weight"], layer.channel_weight)
        assert torch.equal(content[f"{name}.weight/channels"].long(), layer.channels)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["petl_kernels.task"])
    assert about["version"] == 1
    assert about["backbone"] == {n: list(t.shape) for n, t in make().state_dict().items()}
    # On disk: indices and values, and a header of names and shapes.
    values = sum(t.numel() * t.element_size() for t in content.values())
    assert values < path.stat().st_size < values + 8192
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + len(norms) * D
    assert values == 4 * trained + 4 * sum(len(content[f"{name}/channels"]) for name in rows)


def test_a_backbone_shows_what_differs(tmp_path):
    model, report = tuned()
    by_name = save_task(tmp_path / "a", model, include=report.frozen)
    for backbone in (make(), make().state_dict()):
        assert save_task(tmp_path / "b", model, backbone=backbone) == by_name
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert set(save_task(tmp_path / "c", model)) == set(by_name) - set(report.frozen)
    model.blocks[0].up.weight.view(-1)[-1] += 1  # not in a chosen channel, or `sync_` would have put it right
    assert 2 * D - 1 not in model.blocks[0].up.channels
    with pytest.raises(ValueError, match=r"'blocks.0.up.weight' differs from the backbone outside of its channels"):
        save_task(tmp_path / "d", model, backbone=make())
    with pytest.raises(ValueError, match=r"backbone has no tensors like the model's 'blocks.1.norm1.weight', .* more"):
        save_task(tmp_path / "d", model, backbone=make(blocks=1))
    with pytest.raises(TypeError, match=r"backbone must be a module or a state dict, got str"):
        save_task(tmp_path / "d", model, backbone="bert")
    assert not (tmp_path / "d").exists()


def test_a_head_of_its_own(tmp_path):
    model, report = tuned()
    path = tmp_path / "task.safetensors"
    assert not any("head" in name for name in save_task(path, model, include=report.frozen, exclude="head.*"))
    backbone = make()
    backbone.head = nn.Linear(D, CLASSES + 2)
    before = bits(backbone)
    with apply_task(backbone, path):
        backbone.head = copy.deepcopy(model.head)
        assert torch.equal(logits(backbone), logits(model))
        backbone.head = nn.Linear(D, 1)
    assert all(torch.equal(t, before[name]) for name, t in bits(backbone).items() if "head" not in name)


def test_shared_modules_are_saved_once(tmp_path):
    def shared():
        model = make()
        model.blocks[1].up = model.blocks[0].up
        return model

    model = shared()
    tune_channels(model, Selection({"blocks.0.up": torch.tensor([7, 3])}, {"blocks.0.up": 2 * D}))
    train(model, 3)
    path = tmp_path / "task.safetensors"
    assert save_task(path, model) == ["blocks.0.up.weight", "blocks.0.up.bias"]
    backbone = shared()
    before = bits(backbone)
    with apply_task(backbone, path):
        assert torch.equal(logits(backbone), logits(model))
    assert unchanged(backbone, before)
    with pytest.raises(ValueError, match=r"made for another backbone: other tensors are shared"):
        apply_task(make(), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_backbone_of_another_dtype(saved, dtype):
    backbone = make().to(dtype)
    before = bits(backbone)
    with apply_task(backbone, saved[0]):
        content = load_file(saved[0])
        where = content["blocks.0.up.weight/channels"].long()
        assert torch.equal(backbone.blocks[0].up.weight[where], content["blocks.0.up.weight"].to(dtype))
        assert torch.equal(backbone.norm.weight, content["norm.weight"].to(dtype))
    assert unchanged(backbone, before)


def test_a_model_moved_while_a_task_is_applied(saved):
    backbone = make()
    applied = apply_task(backbone, saved[0])
    backbone.to(torch.float64)
    backbone.blocks[0].up.weight = nn.Parameter(backbone.blocks[0].up.weight.detach().clone())
    applied.remove()
    assert unchanged(backbone, bits(make().to(torch.float64)))


def test_one_task_at_a_time(saved, tmp_path):
    path, expected = saved
    backbone = make()
    before = bits(backbone)
    applied = apply_task(backbone, path)
    assert repr(applied) == f"Applied({str(path)!r}, {len(applied.changed)} tensors changed, applied)"
    for part in (backbone, backbone.blocks, nn.Sequential(backbone)):
        with pytest.raises(RuntimeError, match=r"task.safetensors' is applied to this model; remove it first"):
            apply_task(part, path)
    assert torch.equal(logits(backbone), expected)
    twin = copy.deepcopy(backbone)  # the copy is a model of its own, with the task's values for good
    applied.remove()
    applied.remove()
    assert unchanged(backbone, before) and "removed" in repr(applied)
    assert torch.equal(logits(twin), expected)
    with pytest.raises(KeyError), apply_task(backbone, path):
        raise KeyError
    assert unchanged(backbone, before)
    reference = weakref.ref(backbone)
    handle = apply_task(backbone, path)
    del backbone, part
    gc.collect()
    assert reference() is None  # an applied task keeps no model alive
    handle.remove()


def test_remove_refuses_a_changed_model(saved):
    backbone = make()
    applied = apply_task(backbone, saved[0])
    up, backbone.blocks[0].up = backbone.blocks[0].up, nn.Identity()
    now = bits(backbone)
    with pytest.raises(RuntimeError, match=r"^Applied.remove: the model no longer has 'blocks.0.up.weight', 'blocks.0"):
        applied.remove()
    assert unchanged(backbone, now)
    backbone.blocks[0].up = up
    applied.remove()
    assert unchanged(backbone, bits(make()))


def other_shape():
    model = make()
    model.head = nn.Linear(D, CLASSES + 1)
    return model


def more():
    model = make()
    model.extra = nn.Linear(2, 2)
    return model


def with_channels():
    return tuned()[0]


WRONG_BACKBONES = {
    "more-blocks": (lambda: make(blocks=3), ValueError, r"another backbone: it has 'blocks.2.norm1.weight', .* more"),
    "fewer-blocks": (lambda: make(blocks=1), ValueError, r"another backbone: it lacks 'blocks.1.norm1.weight'"),
    "another-architecture": (lambda: make("bert"), ValueError, r"another backbone: it lacks 'embed.weight'"),
    "shape": (other_shape, ValueError, r"'head.weight' is \[4, 24\], not \[3, 24\]; 'head.bias' is \[4\], not \[3\]"),
    "additional-module": (more, ValueError, r"it has 'extra.weight', 'extra.bias' more"),
    "channels": (with_channels, RuntimeError, r"the model holds ChannelLinears; undo them or call merge_channels"),
    "no-model": (lambda: nn.Linear(2, 2).state_dict(), TypeError, r"model must be an nn.Module"),
}


@pytest.mark.parametrize("build, error, message", WRONG_BACKBONES.values(), ids=WRONG_BACKBONES)
def test_made_for_another_backbone(build, error, message, saved):
    model = build()
    before = bits(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=f"^apply_task: .*{message}"):
        apply_task(model, saved[0])
    assert before is None or unchanged(model, before)


def rewritten(path, target, tensors=None, about=None, **entries):
    """The file with some of its tensors and of what it says about itself replaced, or left out where None."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["petl_kernels.task"]) | entries
    content = load_file(path) | (tensors or {})
    header = {name: value for name, value in header.items() if value is not None}
    metadata = {"petl_kernels.task": json.dumps(header) if about is None else about}
    save_file({name: t for name, t in content.items() if t is not None}, target, metadata)
    return target


CHANNELS = "blocks.0.up.weight/channels"
SPOILT = {
    "version": (dict(version=2), r"has format version 2, not 1"),
    "no-json": (dict(about="{"), r"is not a whole task file: JSONDecodeError"),
    "no-signature": (dict(backbone=None), r"is not a whole task file: KeyError\('backbone'\)"),
    "no-channels": (
        dict(tensors={CHANNELS: None}),
        r"is not a whole task file: KeyError\('blocks.0.up.weight/channels'\)",
    ),
    "beyond": (
        dict(tensors={CHANNELS: torch.tensor([0, 1, 2, 48])}),
        r"does not fit the backbone at 'blocks.0.up.weight'",
    ),
    "negative": (dict(tensors={CHANNELS: torch.tensor([0, 1, 2, -1])}), r"does not fit the backbone at"),
    "too-few": (dict(tensors={CHANNELS: torch.tensor([0, 1])}), r"does not fit the backbone at 'blocks.0.up.weight'"),
    "shape": (dict(tensors={"norm.bias": torch.zeros(D + 1)}), r"does not fit the backbone at 'norm.bias'"),
    "unknown": (dict(tensors={"norm.scale": torch.zeros(D)}), r"does not fit the backbone at 'norm.scale'"),
}


@pytest.mark.parametrize("change, message", SPOILT.values(), ids=SPOILT)
def test_spoilt_files(change, message, saved, tmp_path):
    path = rewritten(saved[0], tmp_path / "spoilt.safetensors", **change)
    model = make()
    with pytest.raises(ValueError, match=f"^apply_task: .*{message}"):
        apply_task(model, path)
    assert unchanged(model, bits(make()))
    apply_task(model, rewritten(saved[0], path)).remove()  # what was not spoilt applies


def test_cut_and_missing_files(saved, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved[0].read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"^apply_task: .*cut.safetensors' is not a whole task file"):
        apply_task(make(), cut)
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"^apply_task: .*foreign' is not a task file"):
        apply_task(make(), tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match=r"^apply_task: there is no file .*gone"):
        apply_task(make(), tmp_path / "gone")


def test_an_interrupted_write_onto_the_backbone_is_taken_back(saved, monkeypatch):
    model, write = make(), task_files._write_changes

    def interrupted(state, changes):
        if changes and changes[0].values is not None and not hasattr(interrupted, "ran"):
            interrupted.ran = True
            write(state, changes[:5])
            raise KeyboardInterrupt
        write(state, changes)

    monkeypatch.setattr(task_files, "_write_changes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_task(model, saved[0])
    assert unchanged(model, bits(make()))
    apply_task(model, saved[0]).remove()  # and nothing is left marked as applied


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(at, tmp_path, monkeypatch):
    path = tmp_path / "task.safetensors"
    model, _ = tuned()
    save_task(path, model)
    old = path.read_bytes()
    train(model, 1)

    def crash(*_):
        raise OSError("no space left on device")

    if at == "write":
        monkeypatch.setattr(task_files, "open", lambda *a: Full(open(*a)), raising=False)  # noqa: SIM115
    else:
        monkeypatch.setattr(os, at, crash)
    with pytest.raises(OSError, match=r"no space left"):
        save_task(path, model)
    monkeypatch.undo()
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["task.safetensors"]
    save_task(path, model)
    assert path.read_bytes() != old and os.listdir(tmp_path) == ["task.safetensors"]


class Full:
    """A file on a disk that is full after ten bytes."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[:10])
        raise OSError("no space left on device")


def test_bad_saves(tmp_path):
    path = tmp_path / "task.safetensors"
    with pytest.raises(ValueError, match=r"^save_task: the model has no ChannelLinear and nothing in it trains"):
        save_task(path, make().requires_grad_(False))
    with pytest.raises(ValueError, match=r"^save_task: include 'nrom.\*' matches nothing"):
        save_task(path, make(), include="nrom.*")
    with pytest.raises(ValueError, match=r"^save_task: exclude 'haed.\*' matches nothing"):
        save_task(path, make(), exclude="haed.*")
    with pytest.raises(TypeError, match=r"^save_task: model must be an nn.Module, got int"):
        save_task(path, 3)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        save_task(tmp_path / "no" / "folder", make())
