"""`petl_kernels.nn.BottleneckAdapter`: the op with parameters, and a module like any other."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from table import impls

from petl_kernels import bottleneck_adapter
from petl_kernels.nn import BottleneckAdapter
from petl_kernels.testing import CASES

D, R = 48, 6
FORMS = ["sequential", "parallel"]
SCALES = [0.5, "learned", "channel"]
IMPLS = impls(next(case for case in CASES if case.name == "bottleneck_adapter"))


def x(seed=0, **kwargs):
    return torch.randn(5, D, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_op(impl, scale, bias):
    for form, residual in (("sequential", None), ("parallel", None), ("parallel", x(1))):
        module = BottleneckAdapter(D, R, activation="silu", scale=scale, form=form, init="bert", bias=bias, impl=impl)
        parameters = (module.w_down, module.b_down, module.w_up, module.b_up)
        value = x()
        given = value if form == "sequential" else residual
        expected = bottleneck_adapter(
            value, *parameters, residual=given, activation="silu", scale=module.scale, impl=impl
        )
        got = module(value) if residual is None else module(value, residual)
        assert torch.equal(got, expected)
        got.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("scale, shape", [("learned", (1,)), ("channel", (D,)), (0.5, None)])
def test_parameters(scale, shape):
    module = BottleneckAdapter(D, R, scale=scale)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected = {"w_down": (R, D), "b_down": (R,), "w_up": (D, R), "b_up": (D,)}
    assert shapes == expected | ({} if shape is None else {"scale": shape})
    assert shape is not None or module.scale == 0.5
    bare = BottleneckAdapter(D, R, bias=False)
    assert set(bare.state_dict()) == {"w_down", "w_up"} and bare.b_down is None


def test_houlsby_init():
    torch.manual_seed(0)
    module = BottleneckAdapter(768, 64)
    for weight in (module.w_down, module.w_up):
        assert weight.abs().max() <= 2e-2
        # A normal cut at two standard deviations has 0.8796 of its standard deviation.
        assert weight.std().item() == pytest.approx(0.8796e-2, rel=0.02)


def test_bert_init():
    torch.manual_seed(0)
    module = BottleneckAdapter(768, 64, init="bert")
    for weight in (module.w_down, module.w_up):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02) and weight.abs().max() > 0.06


def test_lora_init_is_the_identity_and_trains():
    module = BottleneckAdapter(768, 64, init="lora", activation="relu")
    bound = 1 / math.sqrt(768)  # Kaiming uniform with a = sqrt 5
    assert module.w_down.abs().max() <= bound and module.w_down.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    value = torch.randn(3, 768)
    output = module(value)
    assert torch.equal(output, value)
    output.square().sum().backward()
    assert module.w_up.grad.abs().sum() > 0


@pytest.mark.parametrize("init", ["houlsby", "bert", "lora"])
@pytest.mark.parametrize("scale", SCALES)
def test_reset_and_meta_construction(init, scale):
    options = dict(init=init, scale=scale, form="parallel")
    torch.manual_seed(3)
    expected = BottleneckAdapter(D, R, **options)
    assert torch.count_nonzero(expected.b_down) == 0 and torch.count_nonzero(expected.b_up) == 0
    deferred = BottleneckAdapter(D, R, device="meta", **options)
    assert all(p.is_meta for p in deferred.parameters())
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    for (name, p), (_, q) in zip(expected.named_parameters(), deferred.named_parameters()):
        assert torch.equal(p, q), name


def test_dtype_and_training_in_bfloat16():
    module = BottleneckAdapter(D, R, dtype=torch.bfloat16, scale="channel")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    masters = BottleneckAdapter(D, R)  # float32 beside bfloat16 activations
    masters(x(dtype=torch.bfloat16)).sum().backward()
    assert masters.w_down.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", SCALES)
def test_copies(scale, tmp_path):
    module = BottleneckAdapter(D, R, scale=scale, init="bert", activation="relu")
    expected = module(x())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded, from_file = (BottleneckAdapter(D, R, scale=scale, init="lora", activation="relu") for _ in range(2))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    save_model(module, tmp_path / "adapter.safetensors")
    load_model(from_file, tmp_path / "adapter.safetensors")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, from_file):
        assert torch.equal(other(x()), expected)
        assert other.w_down.data_ptr() != module.w_down.data_ptr()
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in module.named_parameters()]


def test_compiled_whole():
    torch._dynamo.reset()
    module = BottleneckAdapter(D, R, scale="channel", init="bert")
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x()), module(x()))


def test_repr_is_its_construction():
    module = BottleneckAdapter(D, R, scale="channel", form="parallel", init="lora", bias=False, impl="reference")
    again = eval(repr(module))
    assert repr(again) == repr(module) and "scale='channel'" in repr(module) and "bias=False" in repr(module)
    assert repr(eval(repr(BottleneckAdapter(D, R)))) == repr(BottleneckAdapter(D, R))
    assert "scale='learned'" in repr(BottleneckAdapter(D, R, scale="learned"))


def test_a_sequential_adapter_takes_no_residual():
    with pytest.raises(ValueError, match="BottleneckAdapter: residual must be None in the sequential form"):
        BottleneckAdapter(D, R)(x(), x())


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=0), "d_model must be an integer of at least 1, got 0"),
        (dict(d_model=4.0), r"d_model must be an integer of at least 1, got 4\.0"),
        (dict(bottleneck=-1), "bottleneck must be an integer of at least 1, got -1"),
        (dict(bottleneck=True), "bottleneck must be an integer of at least 1, got True"),
        (dict(activation="swish"), r"activation must be one of \('relu', .*\), got 'swish'"),
        (dict(scale="row"), r"scale must be a float or one of \('learned', 'channel'\), got 'row'"),
        (dict(scale=None), "scale must be a float or one of .*, got None"),
        (dict(scale=True), "scale must be a float or one of .*, got True"),
        (dict(form="serial"), r"form must be one of \('sequential', 'parallel'\), got 'serial'"),
        (dict(init="zeros"), r"init must be one of \('houlsby', 'bert', 'lora'\), got 'zeros'"),
        (dict(impl="fast"), r"impl must be one of .*'reference'.*, got 'fast'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"^BottleneckAdapter: {message}"):
        BottleneckAdapter(**{"d_model": D, "bottleneck": R, **bad})
