"""`fuse` on models of the `peft` library: the same logits and gradients, whatever happens to the model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from peft_models import (
    IMPLS,
    KERNELS,
    TARGETS,
    assert_equal,
    base_model,
    build,
    count_op_calls,
    layers,
    lora,
    peft,
    randomize,
    run_draws,
    run_model,
)
from table import Recorder
from torch import nn
from torch.autograd import forward_ad
from whole_models import worse

from petl_kernels.integrations import fuse, unfuse
from petl_kernels.testing import Outcome, judge


@pytest.fixture
def op_calls(monkeypatch):
    """A list that grows by one element with every call of the op by a fused layer."""
    return count_op_calls(monkeypatch)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3}, {"lora_bias": True}], ids=str)
def test_model_computes_the_same(arch, options, impl, op_calls):
    if arch == "Llama" and "lora_bias" in options:
        pytest.skip("its layers have no bias, which the library wants below an adapter's")
    model = build(arch, **options)
    theirs, exact, keys = run_draws(model), run_draws(model, exact=True), list(model.state_dict())
    named = dict(model.named_modules())
    types = {name: type(m) for name, m in named.items()}
    report = fuse(model, impl=impl, strict=True)
    run_model(model)
    assert op_calls == [impl] * len(report.fused) == [impl] * (2 * len(TARGETS[arch])) and not report.skipped
    assert worse(run_draws(model), theirs, exact) is None
    assert list(model.state_dict()) == keys and dict(model.named_modules()) == named
    assert all(isinstance(m, types[name]) for name, m in named.items())


def test_everything_trains_in_float64(op_calls):
    """The base too, and with it the gradients of the inputs of every layer; fp64 leaves no room for another formula."""
    model = build("Llama").double()
    model.requires_grad_(True)
    theirs = run_model(model)
    assert len(theirs.grads) == len(list(model.parameters()))
    fuse(model, impl="cpp")
    assert_equal(run_model(model), theirs, 1e-11)
    assert len(op_calls) == 14


@pytest.mark.parametrize("impl", [None, "reference", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_half_precision_base(dtype, impl, op_calls, monkeypatch):
    """The library's default: it widens x. Kernels take the float32 weights beside x as it is."""
    monkeypatch.setattr("petl_kernels.integrations.peft._tuner._LEAST", 0)
    model = build(dtype=dtype)
    assert layers(model)[0].lora_A["default"].weight.dtype == torch.float32
    theirs, exact = run_model(model), run_model(copy.deepcopy(model).double())
    assert theirs.output.dtype == dtype
    fuse(model, impl=impl)
    ours = run_model(model)
    assert judge(ours, theirs, exact) == []
    assert op_calls == [impl or "cpp"] * 4
    if impl == "reference":  # the library's own arithmetic, not one with rounded weights
        assert_equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, impl, op_calls):
    model = build(dtype=dtype)
    exact = run_model(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run_model(model)
        fuse(model, impl=impl)
        assert judge(run_model(model), theirs, exact) == []
    assert op_calls == [impl] * 4


def test_dropout_in_training_stays_with_the_library():
    model = build(lora_dropout=0.5).train()
    torch.manual_seed(5)
    theirs = run_model(model)
    report = fuse(model, impl="cpp")
    assert all(what.endswith("not while dropout 0.5 is training") for what in report.fused.values())
    torch.manual_seed(5)
    with Recorder() as recorder:
        assert_equal(run_model(model), theirs)
    assert not recorder.calls
    with Recorder() as recorder:
        run_model(model.eval())
    op = torch.ops.petl_kernels
    names = [func for func, *_ in recorder.calls]
    assert names == [op.bottleneck_adapter_fwd.default] * 4 + [op.bottleneck_adapter_bwd.default] * 4


@pytest.mark.parametrize("rows", [512, 2048])
def test_auto_takes_what_is_large_enough(rows, op_calls):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(r=8, target_modules=["0"]))
    x, layer = torch.randn(rows, 64), layers(randomize(model))[0]
    theirs = layer(x)
    fuse(model)
    ours = layer(x)
    assert op_calls == ([] if rows == 512 else ["cpp"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    fuse(model, impl="auto")
    layer(x)
    assert len(op_calls) == (0 if rows == 512 else 2)
    model.to("meta")  # where nothing was measured
    assert layer(x.to("meta")).is_meta and len(op_calls) == (0 if rows == 512 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_stays_with_the_library(dtype, op_calls, monkeypatch):
    """Which no kernel knows: "auto" finds that out from x, though the dtypes of a mixed call are another matter."""
    monkeypatch.setattr("petl_kernels.integrations.peft._tuner._LEAST", 0)
    layer = layers(build(dtype=dtype))[0]
    x, tangent = torch.randn(2, 3, 16).to(dtype)
    theirs = torch.func.jvp(layer, (x,), (tangent,))
    fuse(layer)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    for ours in (torch.func.jvp(layer, (x,), (tangent,)), dual):
        assert all((o == t).all() for o, t in zip(ours, theirs)) and not op_calls
    layer(x)
    assert op_calls == ["cpp"]


def test_adapters_that_come_and_go(op_calls):
    model = build("Bert", names=("one", "two"))
    model.add_adapter("narrow", lora(target_modules=["value"], r=2))
    randomize(model).double()
    plain = copy.deepcopy(model)
    assert len(fuse(model, impl="cpp").fused) == 10

    def same(calls: int, tolerance: float = 1e-11) -> None:
        op_calls.clear()
        assert_equal(run_model(model), run_model(plain), tolerance)
        assert len(op_calls) == calls

    def both(method: str, *args: Any, **kwargs: Any) -> None:
        for each in (model, plain):
            getattr(each, method)(*args, **kwargs)

    same(4)
    both("set_adapter", "two")
    same(4)
    both("set_adapter", "narrow")
    same(2)
    both("set_adapter", "one")
    both("merge_adapter")
    same(0, 0.0)
    both("unmerge_adapter")
    same(4)
    with model.disable_adapter(), plain.disable_adapter():
        same(0, 0.0)
    same(4)
    for each in (model, plain):
        each.base_model.set_adapter(["one", "two"])
    same(0, 0.0)
    for each in (model, plain):
        each.base_model.set_adapter(["one", "narrow"])  # at the queries only one of them is there
    same(2)
    both("add_weighted_adapter", ["one", "two"], [0.3, 0.6], "mixed", combination_type="linear")
    both("set_adapter", "mixed")
    same(4)
    both("delete_adapter", "one")
    same(4)
    for each in (model, plain):
        for layer in layers(each):
            layer.scale_layer(0.5)
    same(4)
    both("add_adapter", "late", lora())
    both("set_adapter", "late")
    for each in (model, plain):
        randomize(each.double())
    same(4)
    merged = model.merge_and_unload(), plain.merge_and_unload()
    assert not layers(merged[0])
    assert_equal(run_model(merged[0]), run_model(merged[1]))


def test_copies_and_files(tmp_path, op_calls):
    model = build()
    before = run_model(model)
    fuse(model, impl="cpp")
    layer, x = layers(model)[0], torch.randn(3, 16)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert type(again) is type(layer) and again.fused_impl == "cpp"
        torch.testing.assert_close(again(x), layer(x))
    assert_equal(run_model(copy.deepcopy(model)), before, 1e-5)

    model.save_pretrained(str(tmp_path))
    op_calls.clear()
    loaded = peft.PeftModel.from_pretrained(base_model(), str(tmp_path), is_trainable=True).eval()
    assert_equal(run_model(loaded), before)
    fuse(loaded, impl="cpp")
    loaded.load_adapter(str(tmp_path), "again", is_trainable=True)
    loaded.set_adapter("again")
    assert_equal(Outcome(run_model(loaded).output), Outcome(before.output), 1e-5)
    assert len(op_calls) == 4
    loaded.load_state_dict(loaded.state_dict())


def test_unfuse_and_fuse_twice(op_calls):
    model = build()
    before, types = run_model(model), [type(m) for m in model.modules()]
    fuse(model, impl="cpp")
    again = fuse(model, impl="reference")
    assert len(again.fused) == 4 and all(what.endswith("already fused") for what in again.fused.values())
    assert again.fused["base_model.model.bert.encoder.layer.0.attention.self.query[default]"].startswith(
        "LoRA, 16 -> 4 -> 16, scale 1.5"
    )
    run_model(model)
    assert set(op_calls) == {"reference"} and "lora.FusedLinear(" in repr(model)
    assert unfuse(model) == 4 and unfuse(model) == 0
    assert [type(m) for m in model.modules()] == types and "fused_impl" not in layers(model)[0].__dict__
    op_calls.clear()
    assert_equal(run_model(model), before)
    assert not op_calls


@pytest.mark.parametrize("impl", ["cpp", "reference", None])
def test_compile_without_graph_break(impl):
    model = build()
    before = run_model(model)
    fuse(model, impl=impl)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_equal(
        run_model(compiled), Outcome(before.output, {f"_orig_mod.{n}": g for n, g in before.grads.items()}), 1e-4
    )
    code = "".join(m.code for m in graphs[0].modules() if isinstance(m, torch.fx.GraphModule))
    assert len(graphs) == 1 and code.count("petl_kernels.bottleneck_adapter_fwd") == (0 if impl == "reference" else 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, op_calls):
    model = build("Llama").double().train()
    theirs = run_model(model)
    fuse(model, impl="cpp")
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    ours = model(input_ids=torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))).logits
    (ours * torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).double()).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_equal(Outcome(ours.detach(), grads), theirs, 1e-11)
    assert len(op_calls) == 28  # once in forward, once when recomputed
