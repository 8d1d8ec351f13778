"""`petl_kernels.nn.DiffPruningLinear`: gates, penalty, projection, and the channels that it becomes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petl_kernels.nn import ChannelLinear, DiffPruningLinear, expected_l0, project_diffs

IN, OUT = 6, 4
KINDS = [(groups, True) for groups in ("rows", "columns", "tensor", None)]
KINDS += [(groups, False) for groups in ("rows", "columns", "tensor")]
SIZES = {"rows": (OUT, 1), "columns": (1, IN), "tensor": (1, 1)}


def linear(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def trained(groups="rows", elements=True, of=torch.float64, **options):
    module = DiffPruningLinear.from_linear(linear(of), groups=groups, elements=elements, **options)
    for name, p in module.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=1.0 if name.startswith("alpha") else 0.3)
    return module


def opened(module):
    """With every gate open, some in part."""
    for name, p in module.named_parameters():
        if name.startswith("alpha"):
            p.data.abs_().add_(0.1)
    return module


def x(dtype=torch.float64):
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def z(alpha, u=None, temperature=1.0, low=-1.5, high=1.5):
    """The hard-concrete gate, written from the paper's definition."""
    s = 1 / (1 + torch.exp(-((torch.log(u) - torch.log(1 - u) + alpha) / temperature if u is not None else alpha)))
    return torch.minimum(torch.ones_like(s), torch.maximum(torch.zeros_like(s), s * (high - low) + low))


def formula(module, value, draws=None, **gate):
    """`draws`: u of alpha, alpha_group, alpha_bias, alpha_group_bias, in the order in which the module draws."""

    def of(name):
        alpha = getattr(module, name)
        u = None if draws is None or alpha is None else draws[name]
        return torch.ones(1, dtype=value.dtype) if alpha is None else z(alpha, u, **gate)

    entries, groups = of("alpha"), of("alpha_group")
    of_bias = groups.flatten() if module.groups == "rows" else of("alpha_group_bias")
    weight = module.weight + entries * groups * module.delta
    return value @ weight.T + module.bias + of("alpha_bias") * of_bias * module.delta_bias


@pytest.mark.parametrize("groups, elements", KINDS)
def test_evaluation_is_the_formula_without_a_draw(groups, elements):
    module = trained(groups, elements).eval()
    leaves = [value := x().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    got, expected = module(value), formula(module, value)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got, module(value))
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups, elements", KINDS)
def test_training_is_the_formula_with_these_draws(groups, elements):
    gate = dict(temperature=0.7, low=-0.2, high=1.3)
    module = trained(groups, elements, temperature=0.7, stretch=(-0.2, 1.3))
    leaves = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(5)
    got = module(x())
    torch.manual_seed(5)
    order = ("alpha", "alpha_group", "alpha_bias", "alpha_group_bias")
    draws = {name: torch.rand_like(a) for name in order if (a := getattr(module, name)) is not None}
    expected = formula(module, x(), draws, **gate)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not torch.equal(module(x()), got)


@pytest.mark.parametrize("groups, elements", KINDS)
def test_expected_l0_is_how_many_gates_are_open_on_average(groups, elements):
    module = trained(groups, elements, temperature=0.7, stretch=(-0.4, 1.2))
    torch.manual_seed(0)
    counts = torch.tensor([sum((t > 0).sum().item() for t in module._gates(True)) for _ in range(600)]).double()
    deviation = counts.std() / math.sqrt(600)
    assert abs(module.expected_l0() - counts.mean()) < 4 * deviation
    module.expected_l0().backward()
    assert all((p.grad is not None) == name.startswith("alpha") for name, p in module.named_parameters())


def test_published_gates():
    # Stretched to (-1.5, 1.5) at temperature 1 the penalty of a gate is sigmoid(alpha); at 5 it is open in full.
    module = DiffPruningLinear.from_linear(linear(), groups=None)
    assert module.expected_l0().item() == pytest.approx((IN + 1) * OUT / (1 + math.exp(-5.0)), rel=1e-12)
    assert all((gate == 1).all() for gate in module.gates())
    torch.manual_seed(0)
    open_in_full = torch.stack([(module._gates(True)[0] == 1).double().mean() for _ in range(1000)]).mean()
    # P(s > 5/6) = sigmoid(5 - log 5)
    assert open_in_full.item() == pytest.approx(1 / (1 + 5 * math.exp(-5)), abs=0.005)


@pytest.mark.parametrize("groups, elements", KINDS)
def test_starts_as_the_linear_with_these_parameters(groups, elements):
    base = linear()
    before, weight = base(x()), base.weight
    module = DiffPruningLinear.from_linear(base, groups=groups, elements=elements)
    assert torch.equal(module(x()), before) and module.weight is weight and not weight.requires_grad
    shapes = {"delta": (OUT, IN), "delta_bias": (OUT,)}
    shapes |= {"alpha": (OUT, IN), "alpha_bias": (OUT,)} if elements else {}
    shapes |= {} if groups is None else {"alpha_group": SIZES[groups]}
    shapes |= {"alpha_group_bias": (1,)} if groups in ("columns", "tensor") else {}
    assert {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad} == shapes
    module(x()).square().sum().backward()
    assert module.delta.grad.abs().sum() > 0 and weight.grad is None
    bare = DiffPruningLinear.from_linear(linear(), groups=groups, elements=elements, bias=False)
    assert not any("bias" in name for name, p in bare.named_parameters() if p.requires_grad)
    assert torch.equal(bare.eval()(x()), before)


def test_half_precision_weights_have_float32_differences():
    module = trained(of=torch.bfloat16).eval()
    assert module.delta.dtype == module.alpha.dtype == torch.float32
    assert module(x(torch.bfloat16)).dtype == torch.bfloat16
    exact = module.weight.double() + module.gates()[0].double() * module.delta.double()
    assert torch.equal(module.merge().weight, exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("groups, elements", KINDS)
def test_projection_keeps_the_largest_and_fixes_them(groups, elements):
    module = opened(trained(groups, elements))
    gates = module.gates()
    units = (gates[0] * module.delta).detach(), (gates[1] * module.delta_bias).detach()
    if elements:
        k, sizes = 5, torch.cat([u.abs().flatten() for u in units])
    elif groups == "rows":
        k, sizes = 2, torch.cat([units[0], units[1][:, None]], 1).norm(dim=1)
    else:
        of_weight = units[0].norm(dim=0) if groups == "columns" else units[0].norm()[None]
        k, sizes = 1, torch.cat([of_weight, units[1].norm()[None]])
    torch.testing.assert_close(module.magnitudes(), sizes)
    weight, bias = module.weight.clone(), module.bias.clone()
    module.project_(k)
    kept = module.magnitudes() > 0
    assert kept.sum() == k and sizes[kept].min() > sizes[~kept].max()
    assert all(set(t.unique().tolist()) <= {0.0, 1.0} for t in module.gates())
    assert module.expected_l0() == sum(t.sum() for t in module.gates())
    trains = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trains == ["delta", "delta_bias"]
    optimizer = torch.optim.AdamW([module.delta, module.delta_bias], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(x()).square().sum().backward()
        optimizer.step()
    merged, open_gates = module.merge(), [t == 1 for t in module.gates()]
    assert torch.equal(merged.weight[~open_gates[0]], weight[~open_gates[0]])  # bit-identical, decay or not
    assert torch.equal(merged.bias[~open_gates[1]], bias[~open_gates[1]])
    assert (module.magnitudes() > 0).equal(kept) and torch.equal(module.weight, weight)
    torch.testing.assert_close(module(x()), module.eval()(x()), rtol=0, atol=0)  # no draw is left in training


def test_projection_over_a_model():
    model = nn.Sequential(trained(), trained("columns"))
    nn.init.normal_(model[1].delta, std=3.0)
    total = expected_l0(model)
    torch.testing.assert_close(total, model[0].expected_l0() + model[1].expected_l0())
    sizes = torch.cat([layer.magnitudes() for layer in model])
    project_diffs(model, 7)
    after = torch.cat([layer.magnitudes() for layer in model])
    assert torch.equal(after.nonzero().flatten(), sizes.topk(7).indices.sort().values)
    assert expected_l0(model) == 7
    with pytest.raises(ValueError, match="project_diffs: layers must all have gates of entries or all not"):
        project_diffs(nn.Sequential(trained(), trained(elements=False)), 1)
    with pytest.raises(ValueError, match="expected_l0: Linear has no DiffPruningLinear"):
        expected_l0(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"project_diffs: k must be an integer from 0 to \d+, got -1"):
        project_diffs(model, -1)


@pytest.mark.parametrize("groups, dim", [("rows", 0), ("columns", 1)])
@pytest.mark.parametrize("elements", [True, False])
def test_becomes_a_channel_linear(groups, dim, elements):
    module = opened(trained(groups, elements).eval())
    with torch.no_grad():
        module.alpha_group.view(-1)[torch.tensor([0, 2])] = -9.0  # two groups have closed
    expected, norms = module(x()), (module.gates()[0] * module.delta).norm(dim=1 - dim)
    made = copy.deepcopy(module).to_channel_linear()
    assert type(made) is ChannelLinear and made.dim == dim and not made.training
    assert made.channels.tolist() == [c for c in range((OUT, IN)[dim]) if c not in (0, 2)]
    assert (made.channel_bias is not None) == (dim == 0)
    torch.testing.assert_close(made(x()), expected, rtol=1e-12, atol=1e-12)
    few = copy.deepcopy(module).to_channel_linear(2, impl="reference")
    if dim == 1:  # in rows the bias counts too
        assert few.channels.tolist() == sorted(norms.topk(2).indices.tolist())
    assert len(few.channels) == 2 and few.impl == "reference"
    few(x()).square().sum().backward()
    assert few.channel_weight.grad.abs().sum() > 0 and few.weight.grad is None


def test_group_gates_open_and_close_a_row_with_its_bias():
    module = trained("rows", elements=False)
    torch.manual_seed(1)
    for _ in range(20):
        weight, bias = module._gates(True)
        assert torch.equal(weight, bias[:, None].expand_as(weight))
    shared = trained("columns", elements=False)._gates(True)[0]
    assert torch.equal(shared, shared[:1].expand_as(shared))


def test_copies_and_meta_and_compiled():
    module = trained().project_(4)
    loaded = DiffPruningLinear.from_linear(linear())
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x()), module(x()))
    deferred = DiffPruningLinear.from_linear(nn.Linear(IN, OUT, device="meta"))
    assert deferred.alpha.is_meta and deferred(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    torch._dynamo.reset()
    module = trained()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = module(x())
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x()), expected)
    torch.testing.assert_close(compiled.eval()(x()), module(x()))
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(of=torch.float32)(x(torch.float32)).dtype == torch.bfloat16


def test_learns_which_rows_differ():
    """A target that differs in two rows: their gates stay, the others close under the penalty."""
    torch.manual_seed(0)
    base = nn.Linear(16, 12)
    target, before = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        target.weight[[2, 7]] += torch.randn(2, 16)
    module = DiffPruningLinear.from_linear(base, elements=False)
    gates = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("alpha")]
    others = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("delta")]
    optimizer = torch.optim.Adam([dict(params=others, lr=0.02), dict(params=gates, lr=0.1)])
    for _ in range(250):
        value = torch.randn(64, 16)
        optimizer.zero_grad()
        (F.mse_loss(module(value), target(value).detach()) + 3e-4 * module.expected_l0()).backward()
        optimizer.step()
    made = module.eval().to_channel_linear()
    assert made.channels.tolist() == [2, 7]
    value = torch.randn(64, 16)
    assert F.mse_loss(made(value), target(value)) < 0.05 * F.mse_loss(before(value), target(value))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(groups="heads"), "groups must be one of .*, got 'heads'"),
        (dict(groups=None, elements=False), "elements must be True where groups is None"),
        (dict(alpha="5"), "alpha must be a float, got '5'"),
        (dict(temperature=0.0), r"temperature must be positive, got 0\.0"),
        (dict(stretch=(0.0, 1.5)), r"stretch must be a number below 0 and one above 1, got \(0\.0, 1\.5\)"),
    ],
)
def test_bad_arguments_change_nothing(options, message):
    base = linear()
    with pytest.raises(ValueError, match=f"^DiffPruningLinear: {message}"):
        DiffPruningLinear.from_linear(base, **options)
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(TypeError, match=r"DiffPruningLinear: linear must be an nn\.Linear, got Conv1d"):
        DiffPruningLinear.from_linear(nn.Conv1d(2, 2, 1))


def test_bad_calls():
    with pytest.raises(ValueError, match="project_: k must be an integer from 0 to 28, got 29"):
        trained().project_(29)
    with pytest.raises(ValueError, match=r"kept must be torch\.bool \[28\], got torch\.float32 \[3\]"):
        trained().fix_(torch.ones(3))
    with pytest.raises(ValueError, match="groups must be rows or columns to make channels, got 'tensor'"):
        trained("tensor").to_channel_linear()
