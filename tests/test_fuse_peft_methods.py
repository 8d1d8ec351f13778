"""`fuse` on the tuners of `peft` besides LoRA on nn.Linear, by one table: (IA)^3, LN tuning, VeRA, SHiRA, Conv1D."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from peft_models import assert_equal, base_model, peft, randomize, run_draws, run_model
from table import Recorder
from torch import nn
from whole_models import worse

from petl_kernels.integrations import fuse, unfuse
from petl_kernels.testing import Outcome


def _lines(base: nn.Module, r: int, dim: int, **_: Any) -> torch.Tensor:
    """A SHiRA mask of the user's own: every other row or column, as many as r asks for."""
    return torch.zeros(base.weight.shape).index_fill_(dim, torch.arange(0, 4 * r, 2), 1)


def _shira(dim: int) -> Any:
    config = peft.ShiraConfig(r=2, target_modules=["query", "value"], random_seed=0)
    config.mask_fn = functools.partial(_lines, dim=dim)
    return config


# Name -> architecture, configuration, the op and how often two blocks call it.
_METHODS: dict[str, tuple[str, Any, str, int]] = {
    "ia3": (
        "Bert",
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        "channel_scale",
        8,
    ),
    "ia3, Conv1D": (
        "GPT2",
        lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "channel_scale",
        4,
    ),
    "ln": ("Bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]), "layer_norm", 6),
    "vera": ("Bert", lambda: peft.VeraConfig(target_modules=["query", "value"], r=4), "bottleneck_adapter", 4),
    "shira, rows": ("Bert", lambda: _shira(0), "channel_linear", 4),
    "shira, columns": ("Bert", lambda: _shira(1), "channel_linear", 4),
    "lora, Conv1D": (
        "GPT2",
        lambda: peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "bottleneck_adapter",
        4,
    ),
}


def _build(method: str, dtype: torch.dtype = torch.float32) -> Any:
    arch, config, *_ = _METHODS[method]
    return randomize(peft.get_peft_model(base_model(arch).to(dtype), config())).eval()


def _calls(model: nn.Module, method: str) -> tuple[Outcome, int]:
    """A run, and how often it called the method's op backwards (`channel_linear` has no kernel forwards)."""
    with Recorder() as recorder:
        outcome = run_model(model)
    names = [func._schema.name.removeprefix("petl_kernels::") for func, *_ in recorder.calls]
    return outcome, names.count(f"{_METHODS[method][2]}_bwd")


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, "autocast"])
def test_model_computes_the_same(method, dtype):
    """bf16: a base in half precision beside adapters in float32, as the library makes them."""
    if (dtype, method) == ("autocast", "lora, Conv1D"):
        pytest.skip("the library's own errors in all 9 tensors of this model pass half their largest element")
    model = _build(method, torch.float32 if dtype == "autocast" else dtype)
    model = model.double() if dtype == torch.float64 else model
    keys, expected = list(model.state_dict()), _METHODS[method][3]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        theirs, exact = run_draws(model), run_draws(model, exact=True)
        report = fuse(model, impl="cpp", strict=True)
        ours, calls = run_draws(model), _calls(model, method)[1]
    assert len(report.fused) == expected and not report.skipped and list(model.state_dict()) == keys
    assert worse(ours, theirs, exact) is None
    # Under autocast the head's norm gets bfloat16 beside its float32 weights.
    assert calls == (expected - 1 if (dtype, method) == ("autocast", "ln") else expected)
    randomize(model)
    assert unfuse(model) == expected
    if dtype != "autocast":
        assert_equal(run_model(model), theirs[0])


@pytest.mark.parametrize("method", _METHODS)
def test_the_library_goes_on_working(method, tmp_path):
    """Disabled, merged, unmerged, saved, loaded, several adapters: as a model that is not fused."""
    model = _build(method).double()
    plain = copy.deepcopy(model)
    fuse(model, impl="cpp")
    expected = _METHODS[method][3]

    def same(calls: int, tolerance: float = 1e-11) -> None:
        ours, counted = _calls(model, method)
        assert_equal(ours, run_model(plain), tolerance)
        assert counted == calls

    same(expected)
    with model.disable_adapter(), plain.disable_adapter():
        same(0, 0.0)
    same(expected)
    for each in (model, plain):
        each.merge_adapter()
    assert_equal(Outcome(run_model(model).output), Outcome(run_model(plain).output))
    for each in (model, plain):
        each.unmerge_adapter()
    same(expected)
    for layer, other in zip(model.modules(), plain.modules()):
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer) and not isinstance(
            layer.base_layer, nn.LayerNorm
        ):
            assert (layer.base_layer.weight == other.base_layer.weight).all()  # which no call has written to
    model.save_pretrained(str(tmp_path))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert_equal(run_model(again), run_model(model), 1e-12)
    loaded = peft.PeftModel.from_pretrained(base_model(_METHODS[method][0]), str(tmp_path), is_trainable=True).eval()
    fuse(loaded, impl="cpp")
    assert_equal(Outcome(run_model(loaded.double()).output), Outcome(run_model(plain).output), 1e-5)
    if not method.startswith("shira"):  # its mask is not part of the file
        model.load_adapter(str(tmp_path), "again", is_trainable=True)
        model.set_adapter("again")
        ours, calls = _calls(model.double(), method)
        assert_equal(Outcome(ours.output), Outcome(run_model(plain).output), 1e-5)
        assert calls == expected
    merged = model.merge_and_unload(), plain.merge_and_unload()
    assert_equal(Outcome(run_model(merged[0]).output), Outcome(run_model(merged[1]).output), 1e-5)


def test_auto_leaves_small_calls_to_the_library():
    for method in ("ia3", "ln", "vera"):
        model = _build(method)
        theirs = run_model(model)
        fuse(model)
        ours, calls = _calls(model, method)
        assert_equal(ours, theirs)
        assert calls == 0


def test_what_stands_in_the_way_is_named():
    model = _build("shira, rows")
    layer = next(m for m in model.modules() if hasattr(m, "shira_indices"))
    layer.shira_indices["default"] = layer.shira_indices["default"].flip(1)  # whole rows, in another order
    skipped = fuse(model, impl="cpp").skipped
    assert list(skipped.values()) == ["its indices are elements of the weight, not whole rows or columns"]
    model = _build("vera")
    for layer in model.modules():
        if hasattr(layer, "vera_dropout"):
            layer.vera_dropout["default"] = nn.AlphaDropout(0.0)
    with pytest.warns(UserWarning, match="its dropout is AlphaDropout"):
        fuse(model)
    model = _build("ln")
    for layer in model.modules():
        if hasattr(layer, "ln_tuning_layers"):
            layer.ln_tuning_layers["default"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook or a replaced forward on its LayerNorm"):
        fuse(model)


@pytest.mark.parametrize("late", [False, True])
def test_dropout_of_vera_in_training(late):
    model = randomize(
        peft.get_peft_model(base_model(), peft.VeraConfig(target_modules=["query"], r=4, vera_dropout=0.5))
    )
    torch.manual_seed(5)
    theirs = run_model(model.train())
    report = fuse(model.train(not late), impl="cpp")
    assert all(what.endswith("not while dropout 0.5 is training") for what in report.fused.values())
    torch.manual_seed(5)
    ours, calls = _calls(model.train(), "vera")
    assert_equal(ours, theirs)
    assert calls == 0 and _calls(model.eval(), "vera")[1] == 2
