"""The fused steps of the optimizers, by the rule of the table: every implementation against float64.

They are not in `CASES`: a step returns nothing, so that the test of a kernel that returns zeros would test nothing,
and has no first tensor of n rows to resize, transform or export. Here the rule is the same (`judge`), over the same
implementations and dtypes, and a kernel that does nothing has to fail.
"""

from __future__ import annotations

from array import array

import pytest
import torch
from optimizers import CONFIGURATIONS, ENTRIES, EVERY_IMPL, OPS, Trio, entries, entry, gathered, impl_dtype
from table import Recorder, device, setting
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from petl_kernels import explain, use_impl
from petl_kernels.ops.channel_adamw import channel_adamw_
from petl_kernels.ops.channel_sgd import channel_sgd_
from petl_kernels.optim import ChannelAdamW, Channels, ChannelSGD

FUNCTIONS = {"adamw": channel_adamw_, "sgd": channel_sgd_}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("impl, dtype", impl_dtype())
def test_against_torch_on_the_gathered_slices(impl, dtype, configuration):
    kind, options = CONFIGURATIONS[configuration]
    trio = Trio(list(entries(impl, dtype).values()), kind, options, impl)
    trio.step(3)
    assert trio.failures() == []
    assert all(e.others_are_untouched() for e in trio.entries)
    assert {e.param.shape for e in trio.entries} == {torch.Size(shape) for shape, _, _ in ENTRIES.values()}


@pytest.mark.parametrize("configuration", ["adamw", "sgd-nesterov"])
@pytest.mark.parametrize("impl", [p.values[0] for p in impl_dtype() if p.values == ("reference", torch.float32)])
def test_the_reference_is_torch_to_the_bit(impl, configuration):
    kind, options = CONFIGURATIONS[configuration]
    trio = Trio(list(entries(impl).values()), kind, options, impl)
    trio.step(5)
    for e in trio.entries:
        assert torch.equal(gathered(e.param, e.channels, e.dim), e.eager)


@pytest.mark.parametrize("configuration", ["adamw", "sgd", "sgd-momentum"])
@pytest.mark.parametrize("impl, dtype", [p for p in impl_dtype() if p.values[0] != "reference"])
def test_a_kernel_that_does_nothing_fails(impl, dtype, configuration, monkeypatch):
    kind, options = CONFIGURATIONS[configuration]
    trio = Trio([entry(*ENTRIES["rows"], dtype=dtype, on=device(impl))], kind, options, impl)
    monkeypatch.setattr(OPS[kind].OP.module(impl), "launch", lambda *call: None)
    trio.step(3)
    assert [f for f in trio.failures() if "output: error" in f and "vacuous" not in f]


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided-rows": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "strided-columns": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed-strided": lambda t: torch.cat([t.t(), t.t()], -1)[:, : t.shape[0]].t(),
}


@pytest.mark.parametrize("channels, dim", [([7, 0, 3], 0), ([7, 0, 3], 1), (None, 0)], ids=["rows", "columns", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPS)
@EVERY_IMPL
def test_every_strided_matrix_is_updated_in_place(impl, kind, layout, channels, dim):
    """Transposed views too: nothing with distinct elements is refused or copied."""
    e = entry((9, 33), channels, dim, layout=LAYOUTS[layout], on=device(impl))
    storage = e.param.untyped_storage().data_ptr()
    trio = Trio([e], kind, CONFIGURATIONS["adamw" if kind == "adamw" else "sgd-momentum"][1], impl)
    trio.step(3)
    assert trio.failures() == [] and e.others_are_untouched()
    assert e.param.untyped_storage().data_ptr() == storage and not e.param.is_contiguous()


@EVERY_IMPL
def test_gradients_of_any_layout(impl):
    """Expanded, transposed, and, of more than two dimensions, laid out otherwise than the parameter."""
    on = device(impl)
    shapes = {"expanded": (6, 20), "transposed": (6, 20), "conv": (3, 4, 5, 6), "channels_last": (3, 4, 5, 6)}
    params = {name: Parameter(torch.randn(shape, device=on)) for name, shape in shapes.items()}
    params["channels_last"].data = params["channels_last"].data.to(memory_format=torch.channels_last)
    copies = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    ours, eager = ChannelAdamW(params.values(), lr=0.3, impl=impl), torch.optim.AdamW(copies.values(), lr=0.3)
    for _ in range(2):
        grads = {
            "expanded": torch.randn(20, device=on).expand(6, 20),
            "transposed": torch.randn(20, 6, device=on).t(),
            "conv": torch.randn(3, 4, 5, 6, device=on).to(memory_format=torch.channels_last),
            "channels_last": torch.randn(3, 4, 5, 6, device=on),
        }
        for name, grad in grads.items():
            params[name].grad, copies[name].grad = grad, grad.clone()
        ours.step()
        eager.step()
    for name in shapes:
        torch.testing.assert_close(params[name], copies[name], rtol=1e-6, atol=1e-6)


@EVERY_IMPL
@pytest.mark.parametrize("kind", OPS)
def test_bit_identical_over_ten_runs_and_any_threads(impl, kind):
    found = []
    for run in range(10 if impl != "triton" else 3):
        with setting(threads=(2, 1, 3, 7)[run % 4]):
            trio = Trio([entry((130, 260), list(range(0, 130, 3)), on=device(impl))], kind, {"lr": 0.3}, impl)
            trio.step(2)
        found.append(trio.entries[0].param.detach().clone())
    assert all(torch.equal(found[0], again) for again in found[1:])


def test_every_instruction_set_is_correct():
    _cpu = pytest.importorskip("petl_kernels._cpu")
    for name in _cpu.isas():
        with setting(name):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for kind, options in (CONFIGURATIONS["adamw"], CONFIGURATIONS["sgd-nesterov"]):
                    trio = Trio(list(entries("cpp", dtype).values()), kind, options, "cpp")
                    trio.step(3)
                    assert trio.failures() == [], (name, dtype)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("impl", [p.values[0] for p in impl_dtype() if p.values[1] == torch.float32][1:])
def test_one_launch_for_all_groups_shapes_and_dtypes(impl, kind, monkeypatch):
    ours = {"adamw": ChannelAdamW, "sgd": ChannelSGD}[kind]
    on = device(impl)
    items = [entry(*e, dtype=d, on=on).item for e in list(ENTRIES.values())[:9] for d in (torch.float32, torch.float16)]
    groups = [dict(params=items[i::3], lr=0.1 * (i + 1), weight_decay=0.1 * i) for i in range(3)]
    optimizer = ours(groups, impl=impl)
    calls: list[array[float]] = []
    module = OPS[kind].OP.module(impl)
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *call: calls.append(call[1]) or launch(*call))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert len(calls) == 1 and len(calls[0]) == 6 * len(items)
    assert sorted(set(calls[0][0::6])) == [0.1, 0.2, 0.1 * 3]


def call(kind: str, impl: str, **changed: object) -> tuple[list[object], dict[str, object]]:
    """A small call of the op, as positional and keyword arguments."""
    on = device(impl)
    params = [torch.randn(4, 6, device=on), torch.randn(5, device=on)]
    states = [[torch.zeros(2, 6, device=on), torch.zeros(5, device=on)] for _ in range(2 if kind == "adamw" else 1)]
    options = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=[0.1, 0.0])
    lists: dict[str, object] = dict(
        params=params,
        grads=[torch.randn_like(p) for p in params],
        **dict(zip(("exp_avgs", "exp_avg_sqs") if kind == "adamw" else ("momentum_buffers",), states)),
        steps=[torch.zeros((), device=on) for _ in params],
        channels=[torch.tensor([3, 1], device=on), None],
        dims=[0, 0],
    )
    options = options if kind == "adamw" else dict(lr=0.1, momentum=0.9)
    positional = {name: changed.get(name, value) for name, value in lists.items()}
    return list(positional.values()), {**options, **{k: v for k, v in changed.items() if k not in positional}}


@pytest.mark.parametrize("kind", OPS)
@EVERY_IMPL
def test_opcheck(impl, kind):
    args, options = call(kind, impl)
    recorder = Recorder()
    with recorder:
        FUNCTIONS[kind](*args, **options, impl=impl)
    ((overload, recorded, _),) = recorder.calls
    assert overload is OPS[kind].OP.directions["update"].overload
    # "test_aot_dispatch_dynamic" would trace the reference's read of the counters.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(overload, recorded, test_utils=utils)


@pytest.mark.parametrize("kind", OPS)
@EVERY_IMPL
def test_whoever_watches_operators_sees_the_step(impl, kind):
    e = entry(*ENTRIES["rows"], on=device(impl))
    trio = Trio([e], kind, {"lr": 0.3}, impl)
    trio.step()
    e.set_grad(trio.generator)
    with Recorder() as recorder:
        trio.ours.step()
    trio.eager.step(), trio.exact.step()
    assert [made[1][-1] for made in recorder.calls] == [impl]
    assert trio.failures() == []


BAD_CALLS = {
    "grads-short": (dict(grads=[]), ValueError, r"grads must have one entry per parameter = 2, got 0"),
    "params-none": (dict(params=[None, None]), TypeError, r"params\[0\] must be a tensor, got NoneType"),
    "params-twice": (
        lambda c: dict(params=[c["params"][0]] * 2, grads=[c["grads"][0]] * 2, channels=[c["channels"][0]] * 2),
        ValueError,
        r"params must be distinct|must be \[2, 6\]",
    ),
    "grad-shape": (lambda c: dict(grads=c["grads"][::-1]), ValueError, r"grads\[0\] must be \[4, 6\], got \[5\]"),
    "grad-dtype": (
        lambda c: dict(grads=[g.half() for g in c["grads"]]),
        TypeError,
        r"grads\[0\] must be torch.float32, got torch.float16",
    ),
    "grad-sparse": (
        lambda c: dict(grads=[c["grads"][0].to_sparse(), c["grads"][1]]),
        TypeError,
        r"grads\[0\] must be dense, got torch.sparse_coo",
    ),
    "steps": (lambda c: dict(steps=[t.double() for t in c["steps"]]), TypeError, r"steps\[0\] must be torch.float32"),
    "overlap": (
        lambda c: dict(params=[torch.zeros(6).expand(4, 6), c["params"][1]]),
        ValueError,
        r"params\[0\] must not overlap itself",
    ),
    "lr": (dict(lr="fast"), TypeError, r"lr must be a number or a list of numbers, got 'fast'"),
    "lr-short": (dict(lr=[0.1]), ValueError, r"lr must have one entry per parameter = 2, got 1"),
    "scale": (dict(grad_scale=2.0), TypeError, r"grad_scale must be None or a float32 tensor of one element, got 2.0"),
    "dim": (dict(dims=[2, 0]), ValueError, r"dim must be 0 or 1, got 2"),
    "channels": (
        lambda c: dict(channels=[torch.tensor([3, 3]), None]),
        ValueError,
        r"channels must be distinct, got 3 more than once",
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("kind", OPS)
def test_bad_calls_change_nothing(kind, bad):
    changed, error, message = BAD_CALLS[bad]
    names = ["params", "grads", *(["exp_avgs", "exp_avg_sqs"] if kind == "adamw" else ["momentum_buffers"])]
    good = dict(zip([*names, "steps", "channels", "dims"], call(kind, "reference")[0]))
    args, options = call(kind, "reference", **{**good, **(changed(good) if callable(changed) else changed)})
    before = [t.clone() for t in good["params"]]
    with pytest.raises(error, match=rf"channel_{kind}: .*({message})"):
        FUNCTIONS[kind](*args, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, good["params"]))


def test_a_momentum_without_a_buffer_is_refused():
    args, options = call("sgd", "reference", momentum_buffers=[torch.empty(0), torch.zeros(5)])
    with pytest.raises(ValueError, match=r"channel_sgd: momentum_buffers\[0\] must be given beside a momentum"):
        channel_sgd_(*args, **options)


@pytest.mark.parametrize("kind", OPS)
def test_explain_and_precedence(kind, monkeypatch):
    monkeypatch.delenv("PETL_KERNELS_IMPL", raising=False)
    args, options = call(kind, "cpp")
    said = explain(FUNCTIONS[kind], *args, **options)
    assert (said.op, said.chosen) == (f"channel_{kind}", "cpp")
    assert explain(FUNCTIONS[kind], *args, **options, impl="reference").chosen == "reference"
    ours = {"adamw": ChannelAdamW, "sgd": ChannelSGD}[kind]
    p = Parameter(torch.randn(4, 6).double())
    p.grad = torch.randn_like(p)
    optimizer = ours([Channels(p, torch.tensor([1]))])
    optimizer.step()
    before = p.detach().clone()
    message = rf"channel_{kind}: impl='triton' cannot run this call: it has no float64 kernels"
    with use_impl("triton"), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    monkeypatch.setenv("PETL_KERNELS_IMPL", "triton")
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    with pytest.raises(RuntimeError, match=message):
        ours([p], impl="triton").step()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match=rf"channel_{kind}: impl must be one of .* got 'fast'"):
        ours([p], impl="fast")


def test_wrapper_tensors_go_to_the_reference():
    p = Parameter(TwoTensor(torch.randn(4, 6), torch.randn(4, 6)))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"channel_sgd: impl='cpp' .* got a TwoTensor"):
        ChannelSGD([p], impl="cpp").step()
    expected = p.a - 0.1 * p.grad.a
    ChannelSGD([p], lr=0.1).step()
    torch.testing.assert_close(p.a.detach(), expected)
