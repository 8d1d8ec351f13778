"""`fuse` on layers of the `peft` library that keep the library's own path, and the reasons it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import (
    assert_equal,
    base_model,
    build,
    count_op_calls,
    layers,
    peft,
    replace_parts,
    run_model,
)
from torch import nn

from petl_kernels.integrations import fuse


@pytest.fixture
def op_calls(monkeypatch):
    """A list that grows by one element with every call of the op by a fused layer."""
    return count_op_calls(monkeypatch)


class _OwnParameter(nn.Parameter):
    pass


class _OwnDropout(nn.Dropout):
    pass


def _own_weights(linear: nn.Linear) -> nn.Linear:
    linear.weight.__class__ = _OwnParameter
    return linear


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output * 1.5)
    return module


def _replaced(module: nn.Module) -> nn.Module:
    module.forward = module.forward
    return module


# What is done to a model -> why none of its adapters is fused.
_BROKEN: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "hook on A": (lambda m: replace_parts(m, "lora_A", _hooked), "hook or a replaced forward on its Linear"),
    "hook on B": (lambda m: replace_parts(m, "lora_B", _hooked), "hook or a replaced forward on its Linear"),
    "hook on dropout": (lambda m: replace_parts(m, "lora_dropout", _hooked), "replaced forward on its Identity"),
    "forward of B": (lambda m: replace_parts(m, "lora_B", _replaced), "hook or a replaced forward on its Linear"),
    "hook on base": (lambda m: [_hooked(x.base_layer) for x in layers(m)], "replaced forward on its base layer"),
    "forward of layer": (lambda m: [_replaced(x) for x in layers(m)], "its own forward is replaced"),
    "weights": (lambda m: replace_parts(m, "lora_A", _own_weights), "weights are _OwnParameter, not plain"),
    "dropout": (lambda m: replace_parts(m, "lora_dropout", lambda _: _OwnDropout(0.0)), "its dropout is _OwnDropout"),
    "projection": (lambda m: replace_parts(m, "lora_B", nn.utils.parametrizations.spectral_norm), "ParametrizedLinear"),
    "scaling": (lambda m: replace_parts(m, "scaling", lambda s: torch.full((16,), s)), "its scaling is Tensor, not"),
    "base": (
        lambda m: [setattr(x, "base_layer", nn.Sequential(x.base_layer)) for x in layers(m)],
        "layer is Sequential",
    ),
}


def _dora() -> nn.Module:
    return build(use_dora=True)


_BUILT = {"dora": (_dora, "a variant of LoRA: DoraLinearVariant")}


@pytest.mark.parametrize("kind", [*_BROKEN, *_BUILT])
def test_reasons(kind, op_calls):
    if kind in _BUILT:
        make, reason = _BUILT[kind]
        model = make()
    else:
        model = build()
        break_it, reason = _BROKEN[kind]
        break_it(model)
    before, types = run_model(model), [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=f"(?s)layer.0.*{reason}.*layer.1|h.0.*{reason}"):
        fuse(model, strict=True, impl="cpp")
    assert [type(m) for m in model.modules()] == types
    with pytest.warns(UserWarning, match=f"no module was fused(?s:.)*{reason}"):
        report = fuse(model, impl="cpp")
    assert not report.fused and len(report.skipped) == len(layers(model))
    assert all(name.endswith("[default]") for name in report.skipped)
    assert_equal(run_model(model), before)
    assert not op_calls


@pytest.mark.parametrize("kind", [k for k in _BROKEN if k != "forward of layer"])
def test_conditions_hold_at_every_call(kind, op_calls):
    """What comes after `fuse` is respected as what came before it."""
    model = build()
    plain = copy.deepcopy(model)
    fuse(model, impl="cpp")
    torch.manual_seed(0)
    _BROKEN[kind][0](model)
    torch.manual_seed(0)
    _BROKEN[kind][0](plain)
    assert_equal(run_model(model), run_model(plain))
    assert not op_calls


def test_arguments_that_only_the_library_knows(op_calls):
    model = build(names=("one", "two"))
    names = ["one", "two", "__base__"]
    theirs = run_model(model, adapter_names=names)
    fuse(model, impl="cpp")
    assert_equal(run_model(model, adapter_names=names), theirs)
    layer, x = layers(model)[0], torch.randn(3, 16)
    torch.testing.assert_close(layer(x, adapter_names=None), layer(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x, other=1)
    assert len(op_calls) == 1
    assert layer(x=x).shape == (3, 16) and layer(x[0]).shape == (16,) and layer(x[:0]).shape == (0, 16)


@pytest.mark.parametrize("kind", ["float64 x", "float64 adapter", "half adapter", "halves", "no cast", "float64 scale"])
def test_dtypes_that_stay_with_the_library(kind, op_calls):
    model = build()
    layer, x = layers(model)[0], torch.randn(3, 16)
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    if kind == "float64 x":
        layer.base_layer.double()
        x = x.double()
    elif kind == "float64 scale":
        layer.scaling["default"] = torch.tensor(1.5, dtype=torch.float64)
    elif kind == "no cast":
        layer.to(torch.bfloat16), down.float(), up.float()
        layer.cast_input_dtype_enabled, x = False, x.bfloat16()
    else:
        dtype = torch.float64 if kind == "float64 adapter" else torch.bfloat16
        down.to(dtype), up.to(dtype if kind != "halves" else torch.float16)

    def result() -> Any:
        try:
            return layer(x)
        except RuntimeError as error:
            return str(error)

    theirs = result()
    fuse(model, impl="cpp")
    ours = result()
    assert not op_calls and type(ours) is type(theirs)
    if isinstance(theirs, str):
        assert kind in ("halves", "no cast") and ours == theirs
    else:
        assert kind not in ("halves", "no cast") and ours.dtype == theirs.dtype and (ours == theirs).all()


def test_a_scaling_that_is_a_tensor(op_calls):
    """As the library leaves it for compiled models whose adapters are swapped."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = build()
    theirs = run_model(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    fuse(model, impl="cpp")
    ours = run_model(model)
    assert len(op_calls) == 4
    torch.testing.assert_close(ours.output, theirs.output)


def _shira() -> Any:
    return peft.ShiraConfig(r=2, target_modules=["query"], random_seed=0)


_OTHERS = {
    "shira": (_shira, "its indices are elements of the weight, not whole rows"),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=["query"], total_step=9), "a learned diagonal between"),
    "loha": (lambda: peft.LoHaConfig(target_modules=["query"]), "an elementwise product of matrices"),
    "embedding": (lambda: peft.LoraConfig(target_modules=["word_embeddings"]), "of LoRA's layers only Linear, not"),
    "vblora": (lambda: peft.VBLoRAConfig(target_modules=["query"], vector_length=4), "no op for this method"),
}


@pytest.mark.parametrize("kind", _OTHERS)
def test_other_tuners_are_named_with_the_reason(kind):
    make, reason = _OTHERS[kind]
    model = peft.get_peft_model(base_model(), make()).eval()
    before, types = run_model(model), [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match=f"no module was fused(?s:.)*{reason}"):
        report = fuse(model)
    assert not report.fused and all(reason in text for text in report.skipped.values())
    assert [type(m) for m in model.modules()] == types
    assert_equal(run_model(model), before)


def test_nothing_to_fuse():
    with pytest.warns(UserWarning, match="no bottleneck adapter and no tuner layer of peft"):
        assert not fuse(base_model()).skipped
    with pytest.raises(RuntimeError, match="strict"):
        fuse(base_model(), strict=True)
