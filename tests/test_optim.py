"""`petl_kernels.optim` as optimizers: a hundred steps, save and resume, GradScaler, groups, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optimizers import EVERY_IMPL, OPTIMIZERS, Trio, entry, gathered
from table import device
from torch.nn import Parameter

from petl_kernels.optim import ChannelAdamW, Channels, ChannelSGD

ENTRIES = (((24, 40), [23, 5, 11], 0), ((40, 24), [0, 23, 7], 1), ((24,), [3, 1], 0), ((6, 7), None, 0))
LONG = {
    "adamw": ("adamw", dict(lr=0.01, weight_decay=0.1)),
    "sgd-nesterov": ("sgd", dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "sgd-dampening": ("sgd", dict(lr=0.01, momentum=0.9, dampening=0.3, weight_decay=0.1)),
}


def trio(kind="adamw", options=None, impl=None, entries=ENTRIES):
    return Trio([entry(*e, on=device(impl or "cpp")) for e in entries], kind, options or {}, impl)


def saved(optimizer):
    """The state dict, through a file as torch.load reads it by default."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_gradients(*shapes, seed=0):
    torch.manual_seed(seed)
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def snapshot(optimizer):
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    now = snapshot(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))
    assert now[1]["state"].keys() == before[1]["state"].keys()
    for key, state in now[1]["state"].items():
        assert all(torch.equal(value, before[1]["state"][key][name]) for name, value in state.items())
    lrs = [[group["lr"] for group in d["param_groups"]] for d in (now[1], before[1])]
    assert lrs[0] == lrs[1]


@pytest.mark.parametrize("resume", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("configuration", LONG)
@EVERY_IMPL
def test_a_hundred_steps(impl, configuration, resume):
    """Outside the selection bit-identical, inside torch's own result on the gathered slices within a few ulps."""
    kind, options = LONG[configuration]
    found = trio(kind, options, impl)
    found.step(50)
    if resume:
        state = saved(found.ours)
        found.ours = OPTIMIZERS[kind][0]([e.item for e in found.entries], lr=7.0, impl=impl)
        found.ours.load_state_dict(state)
        found.ours.load_state_dict(saved(found.ours))  # at the first load torch adds a key to the defaults
    found.step(50)
    for e in found.entries:
        assert e.others_are_untouched()
        ours, eager = gathered(e.param, e.channels, e.dim), e.eager.detach()
        assert (eager - gathered(e.start, e.channels, e.dim)).abs().min() > 1e-6  # every chosen weight has moved
        ulp = torch.finfo(torch.float32).eps * eager.abs().max()
        assert (ours - eager).abs().max() <= 8 * ulp


def test_state_is_compact_and_of_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        found = Trio([entry(*e, dtype=dtype) for e in ENTRIES], "adamw", {}, None)
        found.step()
        for e in found.entries:
            state = found.ours.state[e.param]
            for name in ("exp_avg", "exp_avg_sq"):
                assert state[name].shape == e.eager.shape and state[name].dtype == dtype
            assert state["step"] == 1 and state["step"].dtype == torch.float32


def test_tensors_without_gradient_are_skipped():
    a, b = with_gradients((4, 5), (4, 5))
    b.grad = None
    before = b.detach().clone()
    optimizer = ChannelAdamW([Channels(a, torch.tensor([1])), b])
    optimizer.step()
    assert torch.equal(b, before) and b not in optimizer.state
    b.grad = torch.randn_like(b)
    optimizer.step()
    assert not torch.equal(b, before)
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (2, 1)
    optimizer.zero_grad()
    assert a.grad is None
    assert optimizer.step() is None


def test_closure_groups_and_schedulers():
    (w, v, x), (w2, v2, x2) = with_gradients((5, 6), (5, 6), (5, 6)), with_gradients((5, 6), (5, 6), (5, 6))
    rows = torch.tensor([4, 0])
    ours = ChannelAdamW([{"params": [Channels(w, rows)], "lr": 0.1}, {"params": [v], "weight_decay": 0.3}])
    slices = Parameter(w2.detach()[rows].clone())
    slices.grad = w2.grad[rows]
    eager = torch.optim.AdamW([{"params": [slices], "lr": 0.1}, {"params": [v2], "weight_decay": 0.3}])
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [0.2, 0.1], total_steps=9) for o in (ours, eager)]
    for optimizer, added in ((ours, Channels(x, rows, 1)), (eager, x2)):
        group = {"params": [added], "lr": 0.5, "betas": (0.5, 0.5), "maximize": True}
        group |= {k: 0.1 for k in ("initial_lr", "max_lr", "min_lr")} | {"max_momentum": 0.9, "base_momentum": 0.8}
        optimizer.add_param_group(group)
    for _ in range(5):
        assert ours.step(lambda: w.sum() * 0 + 3.0) == 3.0
        eager.step()
        for schedule in schedules:
            schedule.optimizer.param_groups[2]["lr"] = 0.5
            schedule.step()
    torch.testing.assert_close(w[rows], slices, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(v, v2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x[:, rows], x2[:, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)], ids=["0-dim", "1-dim"])
def test_lr_may_be_a_tensor(lr):
    (p,), (q,) = with_gradients((4, 5)), with_gradients((4, 5))
    optimizer = ChannelAdamW([p], lr=lr)
    lr.fill_(0.25)
    optimizer.step()
    torch.optim.AdamW([q], lr=0.25).step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_named_parameters():
    a, b = with_gradients((4, 5), (4, 5))
    optimizer = ChannelSGD([("a", Channels(a, torch.tensor([1]))), ("b", b)])
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied):
    found = trio(impl="reference")
    found.step(2)
    other = copied(found.ours)
    assert "channels" not in repr(other) and repr(other) == repr(found.ours)
    params = [p for group in other.param_groups for p in group["params"]]
    for p, e in zip(params, found.entries):
        p.grad = e.param.grad.clone()
    found.ours.step(), other.step()
    assert all(torch.equal(p, e.param) and p is not e.param for p, e in zip(params, found.entries))
    assert other._impl == "reference"


@EVERY_IMPL
def test_autograd_notices_a_step(impl):
    w = Parameter(torch.randn(4, 4, device=device(impl)))
    (w @ w).sum().backward()
    optimizer = ChannelAdamW([Channels(w, torch.tensor([1], device=w.device))], impl=impl)
    for _ in range(2):  # the first step and those after it go different ways
        loss = (w @ w).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EVERY_IMPL
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_changes_under_the_optimizer_is_seen(impl, kind):
    """New storage of a parameter or of its state between two steps."""
    found = trio(kind, LONG["adamw"][1] if kind == "adamw" else LONG["sgd-nesterov"][1], impl)
    found.step()
    for e in found.entries:
        e.param.data = e.param.data.clone()
        state = found.ours.state[e.param]
        found.ours.state[e.param] = {name: value.clone() for name, value in state.items()}
    found.step()
    for e in found.entries:
        next(iter(found.ours.state[e.param].values())).data = next(
            iter(found.ours.state[e.param].values())
        ).data.clone()
    found.step()
    for e in found.entries:
        torch.testing.assert_close(gathered(e.param, e.channels, e.dim), e.eager.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@EVERY_IMPL
def test_grad_scaler(impl, kind):
    """fp16 gradients, scaled; a step with an infinity changes nothing, not even as the first."""
    on, options = (
        device(impl),
        dict(lr=0.1, **({"momentum": 0.9, "dampening": 0.5} if kind == "sgd" else {"eps": 1e-3})),
    )
    e = entry((8, 40), [7, 2], 0, dtype=torch.float16, on=on)
    scaler = torch.amp.GradScaler(on, init_scale=1024.0)
    ours = OPTIMIZERS[kind][0]([e.item], **options, impl=impl)
    eager = OPTIMIZERS[kind][1]([e.exact], **options)
    scaler.scale(torch.zeros((), device=on))  # makes the scale
    generator = torch.Generator().manual_seed(0)
    for infinite in (True, False, False, True, False):
        grad = torch.randn(2, 40, generator=generator).to(on)
        e.exact.grad, scale = grad.double(), scaler.get_scale()
        e.param.grad = torch.zeros_like(e.param)
        e.param.grad[e.channels] = (grad * scale).half()
        if infinite:
            e.param.grad[e.channels[0], 3] = torch.inf
        e.exact.grad = e.param.grad[e.channels].double() / scale
        before = snapshot(ours)
        scaler.step(ours)
        scaler.update()
        assert (scaler.get_scale() < scale) == infinite
        if infinite and before[1]["state"]:
            assert_unchanged(ours, before)
        elif infinite:
            assert all(not value.any() for value in ours.state[e.param].values())
            assert torch.equal(e.param, before[0][0])
        else:
            eager.step()
    assert e.others_are_untouched()
    torch.testing.assert_close(gathered(e.param, e.channels, 0).double(), e.exact.detach(), rtol=4e-3, atol=4e-3)
    assert ours.state[e.param]["step"] == 3


def test_grad_scaler_after_unscale():
    p, q = with_gradients((4, 5), (4, 5))
    q.data, q.grad = p.data.clone(), p.grad.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    p.grad *= 8
    optimizer = ChannelSGD([p], lr=0.1)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.optim.SGD([q], lr=0.1).step()
    torch.testing.assert_close(p, q)


W = torch.zeros(4, 5)
BAD_ENTRIES = {
    "duplicate": (lambda: [Channels(W, torch.tensor([1, 1]))], ValueError, "channels must be distinct, got 1 more"),
    "negative": (lambda: [Channels(W, torch.tensor([-1]))], ValueError, r"channels must lie in \[0, 4\), got -1"),
    "beyond": (lambda: [Channels(W, torch.tensor([4]))], ValueError, r"channels must lie in \[0, 4\), got 4"),
    "beyond-columns": (
        lambda: [Channels(W, torch.tensor([5]), 1)],
        ValueError,
        r"channels must lie in \[0, 5\), got 5",
    ),
    "int32": (lambda: [Channels(W, torch.tensor([1]).int())], TypeError, "channels must be int64"),
    "list": (lambda: [Channels(W, [1])], TypeError, "channels must be a tensor, got list"),
    "dim": (lambda: [Channels(W, torch.tensor([1]), 2)], ValueError, "dim must be 0 or 1, got 2"),
    "dim-negative": (lambda: [Channels(W, torch.tensor([1]), -1)], ValueError, "dim must be 0 or 1, got -1"),
    "vector-dim": (lambda: [Channels(W[0], torch.tensor([1]), 1)], ValueError, "dim must be 0 for a vector, got 1"),
    "three-dim": (lambda: [Channels(W[None], torch.tensor([0]))], ValueError, "must be 1-D or 2-D"),
    "overlap": (lambda: [torch.zeros(5).expand(4, 5)], ValueError, "params must not overlap itself"),
    "complex": (lambda: [torch.zeros(3, dtype=torch.complex64)], TypeError, "must be float32, .* got torch.complex64"),
    "complex-channels": (
        lambda: [Channels(W.to(torch.complex64), torch.tensor([0]))],
        TypeError,
        "Channels.tensor must be float32, .* got torch.complex64",
    ),
    "sparse": (lambda: [torch.eye(3).to_sparse()], TypeError, "params must be dense"),
    "integer": (lambda: [torch.zeros(3, dtype=torch.int64)], TypeError, "must be float32"),
    "not-a-tensor": (lambda: [3], TypeError, "params must hold tensors and Channels, got int"),
    "bare": (lambda: Channels(W, torch.tensor([1])), TypeError, "params must be an iterable, got a Channels"),
    "twice": (lambda: [W, W], ValueError, "some parameters appear more than once"),
    "twice-channels": (lambda: [Channels(W, torch.tensor([0])), W], ValueError, "appear more than once"),
    "twice-groups": (
        lambda: [{"params": [Channels(W, torch.tensor([0]))]}, {"params": [W]}],
        ValueError,
        "more than one parameter group",
    ),
    "non-leaf": (lambda: [W.clone().requires_grad_() * 2], ValueError, "non-leaf"),
    "set": (lambda: [{"params": {W}}], TypeError, "sets"),
    "empty": (lambda: [], ValueError, "empty parameter list"),
    "group-lr": (lambda: [{"params": [W], "lr": -1.0}], ValueError, "lr must be at least 0, got -1.0"),
    "group-channels": (lambda: [{"params": [W], "channels": [1]}], ValueError, "a group has no key 'channels'"),
}


@pytest.mark.parametrize("bad", BAD_ENTRIES)
@pytest.mark.parametrize("optimizer", [ChannelAdamW, ChannelSGD])
def test_bad_entries(optimizer, bad):
    make, error, message = BAD_ENTRIES[bad]
    with pytest.raises(error, match=message):
        optimizer(make())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ChannelAdamW([W], lr=-1.0), "lr must be at least 0"),
        (lambda: ChannelAdamW([W], lr=float("nan")), "lr must be at least 0, got nan"),
        (lambda: ChannelAdamW([W], lr=torch.zeros(2)), "lr must be a float or a tensor of one element"),
        (lambda: ChannelAdamW([W], betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda: ChannelAdamW([W], eps=-1.0), "eps must be at least 0"),
        (lambda: ChannelAdamW([W], weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: ChannelSGD([W], momentum=-1.0), "momentum must be at least 0"),
        (lambda: ChannelSGD([W], nesterov=True), "nesterov requires a momentum"),
        (lambda: ChannelSGD([W], nesterov=True, momentum=0.9, dampening=0.1), "nesterov requires a momentum"),
        (lambda: ChannelAdamW([W], impl="fast"), "channel_adamw: impl must be one of"),
    ],
)
def test_bad_hyper_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_group_changes_nothing():
    optimizer = ChannelAdamW([W])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [torch.zeros(2), Channels(W, torch.tensor([0]))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_and_foreign_gradients_are_refused():
    p, q = with_gradients((4, 5), (4, 5))
    optimizer = ChannelAdamW([p, q])
    optimizer.step()
    p.grad = p.grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"channel_adamw: grads\[0\] must be dense, got torch.sparse_coo"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_the_optimizer_keeps_its_own_channels():
    (w,) = with_gradients((4, 5))
    channels = torch.tensor([1])
    optimizer, before = ChannelSGD([Channels(w, channels)], lr=0.1), w.detach().clone()
    channels.fill_(2)
    optimizer.step()
    assert (w != before).any(1).tolist() == [False, True, False, False]


def other_states():
    """State dicts that do not belong to ChannelAdamW([Channels([4, 5], [1, 3]), [4, 5]])."""

    def of(make, shapes=((4, 5), (4, 5))):
        params = with_gradients(*shapes)
        optimizer = make(*params)
        optimizer.step()
        return optimizer.state_dict()

    rows, more = torch.tensor([1, 3]), torch.tensor([1, 2])
    own = of(lambda a, b: ChannelAdamW([Channels(a, rows), b]))
    wrong = copy.deepcopy(own)
    wrong["state"][0]["exp_avg"] = torch.zeros(3, 5)
    return {
        "channels": (of(lambda a, b: ChannelAdamW([Channels(a, more), b])), "entry 0 of group 0 updates 2 channels"),
        "order": (of(lambda a, b: ChannelAdamW([Channels(a, rows.flip(0)), b])), "entry 0 of group 0 updates"),
        "whole": (of(lambda a, b: ChannelAdamW([a, b])), "updates 2 channels .* saved the whole tensor"),
        "part": (of(lambda a, b: ChannelAdamW([Channels(a, rows), Channels(b, rows)])), "updates the whole tensor"),
        "dim": (of(lambda a, b: ChannelAdamW([Channels(a, rows, 1), b])), "has dim 0, saved 1"),
        "shape": (
            of(lambda a, b: ChannelAdamW([Channels(a, rows), b]), ((6, 5), (4, 5))),
            r"has shape \[4, 5\], saved \[6, 5\]",
        ),
        "state-shape": (wrong, r"exp_avg of entry 0 of group 0 must be \[2, 5\], got \[3, 5\]"),
        "sgd": (of(lambda a, b: ChannelSGD([Channels(a, rows), b], momentum=0.9)), "made by another optimizer"),
        "torch": (of(lambda a, b: torch.optim.AdamW([a, b])), "made by another optimizer: group 0 lacks"),
        "fewer": (of(lambda a, b: ChannelAdamW([Channels(a, rows)])), "doesn't match the size"),
    }


@pytest.mark.parametrize("which", other_states())
def test_another_state_is_refused(which):
    state, message = other_states()[which]
    a, b = with_gradients((4, 5), (4, 5), seed=1)
    optimizer = ChannelAdamW([Channels(a, torch.tensor([1, 3])), b], lr=0.2)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_unchanged(optimizer, before)
    optimizer.step()
