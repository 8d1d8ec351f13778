"""`fuse` on hand-written adapters: what is recognised, that it computes the same, and what is left alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from table import Recorder
from torch import nn

from petl_kernels import fuse, unfuse
from petl_kernels.nn import BottleneckAdapter

D, R = 24, 6


class Adapter(nn.Module):
    """fc1, activation, fc2, residual: as in many repositories."""

    def __init__(self, act=None, p=0.0, **unused):
        super().__init__()
        self.down, self.up = nn.Linear(D, R), nn.Linear(R, D)
        self.act = act or nn.GELU()
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return x + self.drop(self.up(self.drop(self.act(self.down(x)))))


class Inside(Adapter):
    """Its layers in an nn.Sequential, behind a norm, scaled by a number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(D), self.down, nn.ReLU(), self.up)

    def forward(self, x):
        return 0.1 * self.layers(x) + x


class Learned(Adapter):
    """A learned scale, and a residual that is given."""

    def __init__(self, size=1):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((size,), 0.7))

    def forward(self, x, out):
        return out + self.up(F.silu(self.down(x))) * self.gamma


class Bare(Adapter):
    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class Functional(Adapter):
    def forward(self, x):
        return torch.add(self.up(F.gelu(self.down(x), approximate="tanh")), x)


class Dropped(Adapter):
    """Functional dropout, by an attribute and the module's own mode."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x + F.dropout(self.up(F.dropout(F.relu(self.down(x)), self.p, self.training)), 0.0)


class Always(Adapter):
    """Functional dropout that somebody forgot to tell of the mode."""

    def forward(self, x):
        return x + self.up(F.dropout(F.relu(self.down(x)), 0.3))


class Noisy(Adapter):
    """Something else in training."""

    def forward(self, x):
        h = F.relu(self.down(x))
        return x + self.up(h * torch.rand_like(h) if self.training else h)


KINDS = {
    "plain": Adapter,
    "relu": lambda: Adapter(nn.ReLU(inplace=True)),
    "gelu-tanh": lambda: Adapter(nn.GELU("tanh")),
    "inside": Inside,
    "learned": Learned,
    "per-channel": lambda: Learned(D),
    "bare": Bare,
    "functional": Functional,
    "functional-dropout": Dropped,
}


def make(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.ModuleDict({"adapter": KINDS[kind]()}).to(dtype)
    return model, model["adapter"]


def arguments(module, dtype=torch.float64):
    x, out = (torch.randn(3, 5, D, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    given = (x, out) if isinstance(module, Learned) else (x,)
    return tuple(t.requires_grad_() for t in given)


def outcome(module, args):
    y = module(*args)
    leaves = [*args, *(p for _, p in module.named_parameters())]
    grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), *grads


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_function_in_one_call(kind):
    model, module = make(kind)
    args, keys = arguments(module), list(model.state_dict())
    before, own = outcome(module, args), type(module)
    report = fuse(model, impl="cpp", strict=True)
    assert list(report.fused) == ["adapter"] and isinstance(module, own)
    with Recorder() as recorder:
        after = outcome(module, args)
    assert [str(call[0]).split(".")[1] for call in recorder.calls] == [
        "bottleneck_adapter_fwd",
        "bottleneck_adapter_bwd",
    ]
    for a, b in zip(after, before):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys and "already fused" in str(fuse(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other["adapter"]) is type(module)
        assert torch.equal(other["adapter"](*args), after[0])
    assert unfuse(model) == 1 and type(module) is own and not any(n.startswith("fused") for n in vars(module))
    for a, b in zip(outcome(module, args), before):
        assert torch.equal(a, b)


def fused_calls(module, *args, **kwargs):
    with Recorder() as recorder:
        module(*args, **kwargs)
    return len(recorder.calls)


def test_what_a_call_has_to_be_like():
    model, module = make("plain", torch.float32)
    fuse(model, impl="cpp")
    (x,) = arguments(module, torch.float32)
    assert fused_calls(module, x) == 1 and fused_calls(module, x=x) == 0
    module.drop.p = 0.5
    assert fused_calls(module, x) == 0 and fused_calls(module.eval(), x) == 1
    handle = module.up.register_forward_hook(lambda *a: None)
    assert fused_calls(module, x) == 0
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.float32 and fused_calls(module, x) == 1
    module.up = nn.Sequential(nn.Linear(R, D), nn.Tanh())
    assert fused_calls(module, x) == 0


def test_a_learned_scale_under_autocast_is_the_modules_own():
    model, module = make("learned", torch.float32)
    args = arguments(module, torch.float32)
    fuse(model, impl="cpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(module, *args) == 0
    assert fused_calls(module, *args) == 1


class Wide(Adapter):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)


class Gated(Adapter):
    def forward(self, x):
        return x + torch.sigmoid(self.up(self.act(self.down(x))))


class Twice(Adapter):
    def forward(self, x):
        h = self.act(self.down(x))
        return x + self.up(h) + h.mean()


class NormResidual(Inside):
    def forward(self, x):
        x = self.layers[0](x)
        return x + self.up(self.act(self.down(x)))


class Branching(Adapter):
    def forward(self, x):
        return x + self.up(self.act(self.down(x))) if x.sum() > 0 else x


class Elu(Adapter):
    def __init__(self):
        super().__init__(nn.ELU())


class Optional(Adapter):
    def forward(self, x, residual=None):
        return self.up(self.act(self.down(x))) + (x if residual is None else residual)


class ThreeOperands(Adapter):
    def forward(self, x):
        return torch.add(x, self.up(self.act(self.down(x))), alpha=2)


@pytest.mark.parametrize("kind", [Wide, Gated, Twice, NormResidual, Branching, Elu, Optional, ThreeOperands])
def test_other_modules_are_left_alone(kind):
    model = nn.ModuleDict({"adapter": kind().double()})
    with pytest.warns(UserWarning, match="no module was fused"):
        report = fuse(model)
    assert not report.fused and not report.skipped and type(model["adapter"]) is kind


def test_containers_and_our_own_layers_are_left_alone():
    model = nn.ModuleDict(
        {"plain": nn.Sequential(nn.Linear(D, R), nn.ReLU(), nn.Linear(R, D)), "own": BottleneckAdapter(D, R)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not fuse(model).fused


def test_every_adapter_of_a_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn, self.adapter = nn.Linear(D, D), Adapter()

        def forward(self, x):
            return self.adapter(self.ffn(x))

    model = nn.Sequential(*(Block() for _ in range(3)))
    x = torch.randn(4, D)
    before = model(x)
    assert len(fuse(model, strict=True).fused) == 3
    torch.testing.assert_close(model(x), before)
    assert unfuse(model) == 3


def _op_calls(module, args):
    with Recorder() as recorder:
        y = module(*args)
    return y, len(recorder.calls)


@pytest.mark.parametrize("kind", [lambda: Dropped(0.4), Noisy])
def test_what_happens_in_training_alone_stays_there(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"adapter": kind()})
    module, args = model["adapter"], (torch.randn(3, D),)
    modes = [part.training for part in model.modules()]
    theirs = copy.deepcopy(model)["adapter"]
    report = fuse(model.train(), impl="cpp")
    assert report.fused["adapter"].endswith("is training") and [part.training for part in model.modules()] == modes
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = theirs(*args)
        torch.manual_seed(seed)
        got, calls = _op_calls(module, args)
        assert torch.equal(got, wanted) and calls == 0
    got, calls = _op_calls(module.eval(), args)
    torch.testing.assert_close(got, theirs.eval()(*args))
    assert calls == 1
    module.up.train()  # a part in another mode than the whole was never traced
    assert _op_calls(module, args)[1] == 0


def test_an_attribute_set_later_is_seen():
    model, module = make("functional-dropout")
    args = arguments(module)
    fuse(model, impl="cpp")
    assert _op_calls(module, args)[1] == 1
    module.p = 0.5
    torch.manual_seed(1)
    first, calls = _op_calls(module, args)
    assert calls == 0 and not torch.equal(first, module(*args))
    module.p = 0.0
    assert _op_calls(module, args)[1] == 1
    module.down = nn.Linear(D, R).double()
    got, calls = _op_calls(module, args)
    assert calls == 1
    unfuse(model)
    torch.testing.assert_close(got, module(*args))


def test_dropout_that_never_rests_is_reported():
    with pytest.warns(UserWarning, match="its functional dropout is at work in evaluation too"):
        report = fuse(nn.ModuleDict({"adapter": Always()}).eval())
    assert not report.fused
