"""Random calls of every op in `CASES` and steps of the optimizers' ops; `make fuzz` draws as many as it has time for.

A call is a plain dataclass, so that its repr is what repeats it. It is judged by the house's rule against float64, and
where an element is not finite by whether ours is finite where it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from optimizers import OPTIMIZERS, Trio, entry
from table import DTYPES, device, setting
from torch import Tensor

from petl_kernels.testing import CASES, DRAWS, Case, Inputs, Outcome, errors, in_float64, judge_draws, run

Judged = tuple[Outcome, Outcome, Outcome]  # ours, eager's, exact
BY_NAME = {case.name: case for case in CASES}
LARGEST = 1 << 22  # multiply-adds, about: a call and its 32 draws then take seconds
DEEPEST = 256  # of a bottleneck: products over more ranks are one chain of sums, at 768 less accurate than MKL's
WIDE = (64, 96, 128, 256, 512, 768, 1000, 1024, 1025, 2048)

# Layouts of any argument, each with the values it had ("expanded": those of its first row).
VIEWS = {
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "gaps": lambda t: torch.cat([t, t[..., :3]], -1)[..., : t.shape[-1]],
    "columns": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "pages": lambda t: torch.nn.functional.pad(t, (0, -t.shape[-1] % (4096 // t.element_size())))[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


def _one(t: Tensor, value: float, seed: int) -> Tensor:
    if t.numel():
        t.view(-1)[torch.randint(t.numel(), (), generator=torch.Generator().manual_seed(seed))] = value
    return t


# Values that are no draw from a normal distribution.
SPECIALS = {
    "zeros": lambda t, seed: torch.zeros_like(t),
    "constant": lambda t, seed: torch.full_like(t, 0.75),
    "denormal": lambda t, seed: t * torch.finfo(t.dtype).tiny / 8,
    "small": lambda t, seed: t * torch.finfo(t.dtype).tiny ** 0.25,
    "large": lambda t, seed: t * torch.finfo(t.dtype).max ** 0.25,
    "huge": lambda t, seed: t * (torch.finfo(t.dtype).max ** 0.5 / 64),  # its square and their sums are no overflow
    "offset": lambda t, seed: t + 100,
    "nan": lambda t, seed: _one(t, torch.nan, seed),
    "inf": lambda t, seed: _one(t, torch.inf, seed),
    "-inf": lambda t, seed: _one(t, -torch.inf, seed),
}


@dataclass(frozen=True)
class Call:
    """A call of an op: a sample as `Case.inputs` takes it, with other layouts and one argument of special values."""

    case: str
    sample: Mapping[str, Any]
    dtype: str = "float32"
    parameter_dtype: str | None = None
    seed: int = 0
    views: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, str] | None = None
    impl: str = "cpp"
    isa: str | None = None
    threads: int = 2

    def inputs(self, seed: int) -> Inputs:
        parameters = None if self.parameter_dtype is None else getattr(torch, self.parameter_dtype)
        dtype = getattr(torch, self.dtype)
        inputs = BY_NAME[self.case].inputs(self.sample, dtype, parameters, device(self.impl), seed)
        if self.special is not None:
            name, kind = self.special
            inputs = _replaced(
                inputs, name, lambda t: SPECIALS[kind](t.clone(memory_format=torch.contiguous_format), seed)
            )
        for name, layout in self.views.items():
            inputs = _replaced(inputs, name, VIEWS[layout])
        return inputs

    def failures(self, seen: Callable[[float], Any] = lambda share: None) -> list[str]:
        """What breaks the rule; as in `check_draws` the means of 32 draws decide where one fails.

        `seen` is told how large a share of what is allowed the largest error is, of one with enough elements.
        """
        with setting(self.isa, self.threads):
            found, share = self._judged([self.seed])
            seen(share)
            return found and self._judged(range(self.seed, self.seed + DRAWS))[0]

    def _judged(self, seeds: Iterable[int]) -> tuple[list[str], float]:
        case, outcomes, wrong = BY_NAME[self.case], [], []
        for seed in seeds:
            inputs = self.inputs(seed)
            ours = run(case.fn, inputs, impl=self.impl)
            eager = run(case.fn, inputs, impl="reference")
            exact = run(case.fn, in_float64(inputs), impl="reference")
            outcomes.append(comparable(ours, eager, exact, wrong, self.special and self.special[1]))
        if wrong:
            return sorted(set(wrong)), 0.0
        found = [f for f in judge_draws(*zip(*outcomes)) if "vacuous" not in f]  # no matter of the kernel's
        of = dict(outcomes[0][0].items())
        shares = [e.ours / e.bound for e in errors(*outcomes[0]) if of[e.name].numel() >= 32 and e.bound > 0]
        return found, max(shares, default=0.0)


def _replaced(inputs: Inputs, name: str, change: Any) -> Inputs:
    """With one floating-point tensor changed, wherever it stands."""
    old = inputs.get(name)
    if not isinstance(old, Tensor) or not old.is_floating_point() or old.dim() == 0:
        return inputs
    new = change(old.detach()).requires_grad_(old.requires_grad)
    return {key: new if value is old else value for key, value in inputs.items()}


def comparable(ours: Outcome, eager: Outcome, exact: Outcome, wrong: list[str], special: str | None = None) -> Judged:
    """The outcomes with zeros where nothing can be compared; what is wrong there is added to `wrong`.

    Where eager's is finite ours has to be, and where a NaN or an infinity came in and passed through the exact one it
    has to pass through ours. What cancels to nothing has no scale that an error could be measured by.
    """
    kept: list[dict[str, Tensor]] = [{}, {}, {}]
    for (name, got), (_, same_dtype), (_, true) in zip(ours.items(), eager.items(), exact.items(), strict=True):
        finite = same_dtype.isfinite() & true.isfinite()
        if got.shape == true.shape:
            if not got[finite].isfinite().all():
                wrong.append(f"{name}: not finite where eager's is")
            if special in ("nan", "inf", "-inf") and got[~true.isfinite() & ~same_dtype.isfinite()].isfinite().any():
                wrong.append(f"{name}: finite where neither eager's nor the exact one is")
            if not (true[finite].abs() > 1e-12).any():
                finite &= got.abs() > 1e-3
        for into, t in zip(kept, (got, same_dtype, true)):
            into[name] = torch.where(finite, t, torch.zeros_like(t)) if t.shape == finite.shape else t
    made = [Outcome(of.pop("output"), {name[1:]: t for name, t in of.items()}) for of in kept]
    return made[0], made[1], made[2]


@dataclass(frozen=True)
class Step:
    """Steps of an optimizer over entries (shape, channels or None, dim, layout)."""

    kind: str
    options: Mapping[str, Any]
    entries: tuple[Any, ...]
    dtype: str = "float32"
    steps: int = 2
    grad_scale: float = 1.0
    seed: int = 0
    impl: str = "cpp"
    isa: str | None = None
    threads: int = 2

    def failures(self, seen: Callable[[float], Any] = lambda share: None) -> list[str]:
        """What breaks the rule, and what has changed without having been chosen."""
        with setting(self.isa, self.threads):
            generator = torch.Generator().manual_seed(self.seed)
            options = dict(dtype=getattr(torch, self.dtype), on=device(self.impl), generator=generator)
            made = [
                entry(shape, channels, dim, layout=VIEWS.get(layout, lambda t: t), **options)
                for shape, channels, dim, layout in (*self.entries, ((24, 50), None, 0, None))
            ]
            trio = Trio(made, self.kind, self.options, self.impl)
            trio.generator = generator
            trio.step(self.steps, self.grad_scale)
            moved = [list(e.param.shape) for e in made if not e.others_are_untouched()]
            wrong = [f"{shape}: what was not chosen has changed" for shape in moved]
            found = trio.failures(lambda *outcomes: comparable(*outcomes, wrong))
            return wrong + [f for f in found if "vacuous" not in f]


# --- strategies --------------------------------------------------------------------------------------------------


@st.composite
def samples(draw: Any, case: Case) -> dict[str, Any]:
    """A sample of the table with its sizes redrawn: any int from the smallest the table has, up to 128, the widest
    bottleneck of Triton's adapters with a norm."""
    sample = dict(draw(st.sampled_from(case.samples)))
    for key, value in sample.items():
        if type(value) is int:
            sample[key] = draw(st.integers(min(s.get(key, value) for s in case.samples), 128))
    return sample


@st.composite
def crossed(draw: Any, case: Case) -> dict[str, Any]:
    """Such a sample with some options of others, any subset frozen, and sizes from one element to thousands."""
    sample = draw(samples(case))
    known: dict[str, list[Any]] = {}
    for other in case.samples:
        for key, value in other.items():
            if value not in known.setdefault(key, []):
                known[key].append(value)
    names = sorted({name for frozen in known.pop("frozen", []) for name in frozen})
    del known["id"]
    for key in draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=5)):
        sample[key] = draw(st.sampled_from(known[key]))
    for key in ("n", "d", "d_out", "r", "k"):
        if key in sample and draw(st.booleans()):
            smallest = min(1, *(s[key] for s in case.samples if key in s))
            sizes = st.one_of(st.integers(smallest, 40), st.integers(1, 400), st.sampled_from(WIDE))
            sample[key] = min(draw(sizes), DEEPEST if key == "r" else WIDE[-1])
    if "leading" in sample:
        sample["leading"] = draw(st.lists(st.integers(0, 6), max_size=3).map(tuple))
    if names and draw(st.booleans()):
        sample["frozen"] = tuple(draw(st.lists(st.sampled_from(names), unique=True)))
    if "tasks" in sample:
        sample["tasks"] = min(sample["tasks"], 6)
    rows = sample["n"] * math.prod(sample.get("tokens", ()))
    sizes = sorted((rows, *(sample.get(key, 1) for key in ("d", "d_out", "r", "k", "tasks"))))
    if math.prod(sizes[-3:]) > LARGEST:
        sample["n"] = 3
    sample.pop("id")
    return sample


def _isas(impl: str) -> st.SearchStrategy[str | None]:
    if impl != "cpp":
        return st.none()
    from petl_kernels import _cpu

    return st.sampled_from(_cpu.isas())


@st.composite
def calls(draw: Any, name: str, impl: str) -> Call:
    """Calls of an op."""
    sample = draw(crossed(BY_NAME[name]))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES[impl]]
    dtype = draw(st.sampled_from(dtypes))
    others = [None] if dtype == "float64" else [None, "float32", "bfloat16", "float16"]
    call = Call(name, sample, dtype, draw(st.sampled_from(others)), draw(st.integers(0, 2**16)), impl=impl)
    tensors = sorted(n for n, v in call.inputs(0).items() if isinstance(v, Tensor) and v.is_floating_point())
    some = st.sampled_from(tensors)
    return replace(
        call,
        views=draw(st.dictionaries(some, st.sampled_from(sorted(VIEWS)), max_size=3)),
        special=draw(st.one_of(st.none(), st.tuples(some, st.sampled_from(sorted(SPECIALS))))),
        isa=draw(_isas(impl)),
        threads=draw(st.integers(1, 4)),
    )


@st.composite
def entries(draw: Any) -> tuple[Any, ...]:
    """A tensor with all of it, some rows or some columns, in a layout without overlaps."""
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    layout = draw(st.sampled_from((None, "gaps", "columns", "transposed", "offset", "pages"))) if shape else None
    if len(shape) not in (1, 2) or not draw(st.booleans()):
        return shape, None, 0, layout if len(shape) < 3 else None
    dim = draw(st.integers(0, len(shape) - 1))
    some = st.lists(st.integers(0, shape[dim] - 1), unique=True) if shape[dim] else st.just([])
    return shape, draw(some), dim, layout


@st.composite
def steps(draw: Any, name: str, impl: str) -> Step:
    """Steps of an optimizer."""
    share = st.sampled_from((0.0, 0.1, 0.5, 0.9, 0.999))
    options = dict(
        lr=draw(st.sampled_from((0.0, 1e-3, 0.3, 10.0))), weight_decay=draw(share), maximize=draw(st.booleans())
    )
    if name == "adamw":
        options |= dict(betas=(draw(share), draw(share)), eps=draw(st.sampled_from((1e-8, 1e-2))))
    else:
        options |= dict(momentum=draw(share))
        nesterov = options["momentum"] > 0 and draw(st.booleans())
        options |= dict(nesterov=nesterov, dampening=0.0 if nesterov else draw(share))
    return Step(
        name,
        options,
        tuple(draw(st.lists(entries(), max_size=6))),
        draw(st.sampled_from([str(dtype).removeprefix("torch.") for dtype in DTYPES[impl]])),
        draw(st.integers(1, 4)),
        draw(st.sampled_from((0.0, 1e-3, 1.0, 1e3))),
        draw(st.integers(0, 2**16)),
        impl,
        draw(_isas(impl)),
        draw(st.integers(1, 4)),
    )


def strategy(name: str, impl: str) -> st.SearchStrategy[Call | Step]:
    """Random calls of an op or steps of an optimizer, by its name."""
    return steps(name, impl) if name in OPTIMIZERS else calls(name, impl)
