"""`fuse` on single sites, on what it cannot fuse, and its report."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys

import pytest
import torch
from adapter_models import (
    IMPLS,
    PRESETS,
    D,
    adapters,
    assert_same,
    bn_config,
    build,
    count_op_calls,
    make_site,
    run_model,
    run_site,
)
from adapters.composition import Average
from adapters.methods.bottleneck import BottleneckState
from adapters.methods.modeling import Adapter
from torch import nn

from petl_kernels.integrations import fuse
from petl_kernels.integrations.adapters import bottleneck as integration
from petl_kernels.testing import judge


@pytest.fixture
def op_calls(monkeypatch):
    """A list that grows by one element with every call of the op by a fused site."""
    return count_op_calls(monkeypatch)


_FLAGS = ("original_ln_before", "original_ln_after", "ln_before", "ln_after", "adapter_residual_before_ln")


@pytest.mark.parametrize("scaling", [1.0, 4.0, "learned", "channel"])
@pytest.mark.parametrize("parallel", [False, True])
def test_every_configuration_of_a_site(parallel, scaling, op_calls, monkeypatch):
    agreed = 0
    for *flags, residual in itertools.product(*[(True, False)] * len(_FLAGS), (True, False, "post_add")):
        options = dict(zip(_FLAGS, flags), residual_before_ln=residual, is_parallel=parallel, scaling=scaling)
        for with_norm in (True, False):
            site, norm = make_site(bn_config(**options))
            site, norm = site.double(), norm.double() if with_norm else None
            try:
                theirs = run_site(site, norm, (torch.float64,) * 2)
            except UnboundLocalError:  # "post_add" with nothing added: the library has no such residual
                fuse(site)
                with pytest.raises(UnboundLocalError):
                    run_site(site, norm, (torch.float64,) * 2)
                continue
            fuse(site)
            for least in (0, 1 << 20):  # the norm absorbed where it can be, and behind the adapter
                monkeypatch.setattr(integration, "_WORTHWHILE", least)
                op_calls.clear()
                assert_same(run_site(site, norm, (torch.float64,) * 2), theirs, 1e-11)
                assert len(op_calls) == 1, options
            agreed += 1
    assert agreed == (192 if parallel else 144)


def test_the_norm_is_absorbed_where_one_call_is_the_faster_one(monkeypatch):
    """Or where an implementation was asked for; never across a hook on the norm, which expects to be called."""
    used = []
    for name in ("adapter_norm", "bottleneck_adapter"):
        op = getattr(integration, name)
        monkeypatch.setattr(integration, name, lambda *a, op=op, **k: used.append(op.__name__) or op(*a, **k))
    site, norm = make_site(bn_config(original_ln_before=False))
    for impl, least, hooked in ((None, 1 << 20, False), (None, 1, False), ("cpp", 1 << 20, False), ("cpp", 1, True)):
        monkeypatch.setattr(integration, "_WORTHWHILE", least)
        fuse(site, impl=impl)
        hook = norm.register_forward_hook(lambda *_: None) if hooked else None
        run_site(site, norm)
        if hook:
            hook.remove()
    assert used == ["bottleneck_adapter", "adapter_norm", "adapter_norm", "bottleneck_adapter"]


_NONLINEARITIES = [
    *("relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
    *("gelu_python_tanh", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "leakyrelu", "linear"),
]


@pytest.mark.parametrize("name", _NONLINEARITIES)
def test_nonlinearities(name, op_calls):
    site, norm = make_site(bn_config(non_linearity=name))
    theirs = run_site(site.double(), norm.double(), (torch.float64,) * 2)
    fuse(site)
    # The library writes sqrt(2 / pi) out to 16 decimal places or to 10.
    assert_same(run_site(site, norm, (torch.float64,) * 2), theirs, 1e-9)
    assert len(op_calls) == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scaling", [1.0, "learned", "channel"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product(*[(torch.float32, torch.bfloat16)] * 2)), ids=str)
def test_autocast(dtypes, parallel, scaling, impl, op_calls):
    site, norm = make_site(bn_config(is_parallel=parallel, scaling=scaling, original_ln_after=False))
    exact = run_site(copy.deepcopy(site).double(), norm.double(), (torch.float64,) * 2)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run_site(site, norm, dtypes)
        fuse(site, impl=impl)
        op_calls.clear()
        ours = run_site(site, norm, dtypes)
    assert len(op_calls) == 1
    if scaling != 1.0:
        assert ours.output.dtype == torch.float32
        assert (ours.output != ours.output.bfloat16()).any()  # float32 throughout, not widened at the end
        # Its gradient: the library multiplies in float32, the op's reference in the dtype of x.
        assert_same(ours, theirs, 0.02)
        for outcome in (ours, theirs, exact):
            del outcome.grads["adapters.a.scaling"]
    assert judge(ours, theirs, exact) == []


@pytest.mark.parametrize("scaling", [1.0, "learned", "channel"])
def test_autocast_inside_a_composition(scaling, op_calls):
    """A parallel core adds no residual there, which could decide the dtype."""
    site, norm = make_site(bn_config(is_parallel=True, scaling=scaling))
    site.adapters_config.active_setup = Average("a", weights=[1.0])
    with torch.autocast("cpu", torch.bfloat16):
        state = BottleneckState(*[torch.randn(2, 3, D)] * 3, norm)
        theirs = site.compose_single("a", state).hidden_states
        fuse(site)
        ours = site.compose_single("a", state).hidden_states
    assert len(op_calls) == 1 and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_dtypes_that_do_not_match_stay_with_the_library(op_calls):
    site, norm = make_site(bn_config())
    fuse(site)
    with pytest.raises(RuntimeError, match="dtype"):
        run_site(site, norm, (torch.bfloat16, torch.bfloat16))
    assert not op_calls


class _OwnAdapter(Adapter):
    pass


class _OwnParameter(nn.Parameter):
    pass


def _break(kind: str) -> nn.Module:
    configs = {
        "compacter": adapters.CompacterPlusPlusConfig(reduction_factor=2, phm_dim=2),
        "prelu": adapters.SeqBnConfig(reduction_factor=4, non_linearity="prelu"),
        "quick_gelu": adapters.SeqBnConfig(reduction_factor=4, non_linearity="quick_gelu"),
    }
    model = build("bert", configs.get(kind, PRESETS["seq_bn"]))
    for layer in model.encoder.layer:
        adapter = layer.output.adapters["a"]
        if kind == "hook":
            adapter.adapter_down[0].register_forward_pre_hook(lambda module, args: None)
        elif kind == "subclass":
            adapter.__class__ = _OwnAdapter
        elif kind == "weights":
            adapter.adapter_up.weight.__class__ = _OwnParameter
        elif kind == "slope":
            adapter.non_linearity.f = nn.LeakyReLU(0.2)
        elif kind == "replaced forward":
            adapter.adapter_up.forward = adapter.adapter_up.forward
    return model


_REASONS = {
    "compacter": "PHMLayer, not nn.Linear",
    "prelu": "activation PReLU",
    "quick_gelu": "activation QuickGELU",
    "slope": r"activation LeakyReLU\(negative_slope=0.2\)",
    "weights": "weights are _OwnParameter, not plain",
    "hook": "hook or a replaced forward on its Linear",
    "replaced forward": "hook or a replaced forward on its Linear",
    "subclass": "_OwnAdapter is a class of its own",
}


@pytest.mark.parametrize("kind", _REASONS)
def test_reasons(kind, op_calls):
    model = _break(kind)
    before = run_model(model)
    types = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=f"(?s)layer.0.*{_REASONS[kind]}.*layer.1"):
        fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == types
    with pytest.warns(UserWarning, match=f"no module was fused(?s:.)*{_REASONS[kind]}"):
        report = fuse(model)
    assert list(report.skipped) == [f"encoder.layer.{i}.output.adapters.a" for i in range(2)] and not report.fused
    assert_same(run_model(model), before, 0)
    assert not op_calls


def test_report_renders(op_calls):
    from rich.console import Console

    model = build("bert", PRESETS["double_seq_bn"])
    model.add_adapter("prelu", config=adapters.SeqBnConfig(non_linearity="prelu"))
    report = fuse(model)
    assert str(report).startswith("4 modules fused, 2 not\n")
    assert "encoder.layer.0.output.adapters.a: sequential, 16 -> 4, silu, scale 1.0" in str(report)
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(report)
    assert "encoder.layer.1.output.adapters.prelu" in console.export_text()


def test_nothing_to_fuse():
    with pytest.warns(UserWarning, match="no bottleneck adapter"):
        assert not fuse(nn.Linear(2, 2)).fused
    with pytest.raises(RuntimeError, match="strict"):
        fuse(nn.Linear(2, 2), strict=True)
    site, _ = make_site(bn_config())
    with pytest.warns(UserWarning, match="not inside a BottleneckLayer"):
        fuse(nn.Sequential(site.adapters["a"]))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got int"):
        fuse(3)
    with pytest.raises(ValueError, match=r"fuse: impl must be one of .* got 'fast'"):
        fuse(nn.Linear(2, 2), impl="fast")


def test_a_broken_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "petl_kernels.integrations.adapters", None)
    with pytest.warns(UserWarning, match="cannot be imported: ModuleNotFoundError"):
        report = fuse(nn.Linear(2, 2))
    assert "cannot be imported" in report.unavailable["adapters"]


def test_import_needs_neither_library():
    program = (
        "import sys, warnings; sys.modules['adapters'] = sys.modules['transformers'] = None\n"
        "from torch import nn; from petl_kernels.integrations import fuse, unfuse\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    report = fuse(nn.Linear(2, 2))\n"
        "print(len(caught), report, unfuse(nn.Linear(2, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("1 0 modules fused"), done.stdout + done.stderr
