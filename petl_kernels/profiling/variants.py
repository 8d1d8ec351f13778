"""The variants of a training step: frozen, eager, compiled, fused; and whether they compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from petl_kernels.integrations import FuseReport, fuse
from petl_kernels.ops._op import REFERENCE
from petl_kernels.ops._select import use_impl
from petl_kernels.profiling.sites import Site, find_sites, freeze, take_out
from petl_kernels.profiling.target import WANTED, Parts, Target, TargetError

VARIANTS = ("frozen", "eager", "compiled", "fused", "fused+compiled")
DEFAULT = VARIANTS[:4]
# Largest relative difference (L2, all gradients together) from eager that still is rounding. In 12 layers of BERT base
# the kernels' is 1e-6 in fp32 and 1e-2 in bf16; a wrong term, a dropped bias or zeros give 0.1 to 1.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Variant:
    """One way to run the step, or why it cannot run.

    Attributes:
        unavailable: the reason, where there is one.
        fuse: what `fuse` did to its model.
        difference: of loss and gradients from eager's, relative.
    """

    name: str
    parts: Parts
    impl: str | None = None
    compiled: bool = False
    sites: list[Site] = field(default_factory=list)
    unavailable: str | None = None
    fuse: FuseReport | None = None
    difference: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.parts.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self._called: Any = torch.compile(self.parts.model) if self.compiled else self.parts.model

    def implementation(self) -> AbstractContextManager[None]:
        """The block in which this package's ops run as this variant has it."""
        return nullcontext() if self.impl is None else use_impl(self.impl)

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            TargetError: it is no scalar that has a gradient.
        """
        with self.implementation():
            loss = self.parts.loss(self._called, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            without = " that has no gradient" if isinstance(loss, Tensor) and loss.numel() == 1 else ""
            raise TargetError(f"its loss(model, batch) returned {what}{without}; wanted is {WANTED}")
        return loss

    def step(self, now: Callable[[], float] | None = None) -> list[float]:
        """One training step, data to optimizer; with a clock, when it began and when each of the four parts ended."""
        marks = [now()] if now else []
        with record_function("data"):
            batch = self.parts.feed.next()
        if now:
            marks.append(now())
        with record_function("forward"):
            loss = self.loss(batch)
        if now:
            marks.append(now())
        with record_function("backward"), self.implementation():
            loss.backward()
        if now:
            marks.append(now())
        with record_function("optimizer"):
            if self.optimizer is not None:
                self.optimizer.step()
            self.parts.model.zero_grad(set_to_none=True)
        if now:
            marks.append(now())
        return marks

    def gradients(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients without dropout, in whose random numbers the variants differ."""
        model = self.parts.model
        modes = [(part, part.training) for part in model.modules()]
        try:
            model.eval()
            loss = self.loss(batch)
            with self.implementation():
                loss.backward()
            found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
            return loss.detach(), found
        finally:
            model.zero_grad(set_to_none=True)
            for part, mode in modes:
                part.training = mode


def make(name: str, target: Target, eager: Variant | None, impl: str | None, adapters: Sequence[str]) -> Variant:
    """A variant with the weights of `eager`, or `eager` itself where that is None.

    Raises:
        TargetError: the target cannot be built.
        ValueError: `adapters` matches nothing.
    """
    if eager is None:
        parts = target.build()
        if not any(p.requires_grad for p in parts.model.parameters()):
            raise TargetError(f"{target.name}: no parameter of its model trains")
        return Variant(name, parts, REFERENCE, sites=find_sites(parts.model, adapters))
    if name == "frozen":
        return _frozen(target, eager, adapters)
    parts = target.build()
    parts.model.load_state_dict(eager.parts.model.state_dict())
    report = None
    if name.startswith("fused"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was fused, which the report says
            report = fuse(parts.model, impl=impl)
    chosen = impl if report is not None else REFERENCE
    sites = find_sites(parts.model, adapters)
    return Variant(name, parts, chosen, name.endswith("compiled"), sites, fuse=report)


def _frozen(target: Target, eager: Variant, adapters: Sequence[str]) -> Variant:
    reason = None
    parts = target.build(adapters=not target.bare)
    state = eager.parts.model.state_dict()
    parts.model.load_state_dict(state, strict=not target.bare)
    if target.bare:
        freeze(parts.model, eager.parts.model, {site.name for site in eager.sites})
    else:
        reason = take_out(parts.model, eager.parts.model, adapters)
    return Variant("frozen", parts, REFERENCE, unavailable=reason)


@dataclass(frozen=True)
class Reference:
    """What eager computes for a batch, and by how much another variant's gradients may differ from it.

    Attributes:
        itself: how much eager's gradients differ between two calls.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    itself: float
    bound: float


def reference(eager: Variant, batch: Any) -> Reference:
    """Loss and gradients of eager; its weights must not change before the others are compared.

    Raises:
        TargetError: the gradients are zero, so that nothing can be compared.
    """
    loss, gradients = eager.gradients(batch)
    if not gradients or not _norm(gradients.values()) > 0:
        raise TargetError("the gradients of its loss are zero, or not finite")
    itself = _difference(eager.gradients(batch)[1], gradients)
    return Reference(loss, gradients, itself, max(TOLERANCE[lowest_precision(eager, batch)], 2 * itself))


def compare(variant: Variant, wanted: Reference, batch: Any) -> str | None:
    """Write the variant's difference from eager down, and return what is wrong with it, or None."""
    loss, got = variant.gradients(batch)
    if missing := wanted.gradients.keys() ^ got.keys():
        return f"{variant.name}: gradients of {', '.join(sorted(missing)[:3])} are there in one of it and eager only"
    off = _difference(got, wanted.gradients)
    relative = ((loss - wanted.loss).abs() / wanted.loss.abs().clamp_min(1e-30)).item()
    variant.difference = {"loss": relative, "gradients": off}
    if not off <= wanted.bound:
        return f"{variant.name}: its gradients differ from eager's by {off:.2g} of them"
    if wanted.bound >= 0.5:
        return f"{variant.name}: not comparable, eager's gradients differ by {wanted.itself:.2g} between two calls"
    return None


def _norm(tensors: Any) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def _difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return _norm([got[name].double() - value.double() for name, value in wanted.items()]) / _norm(wanted.values())


def lowest_precision(variant: Variant, batch: Any) -> torch.dtype:
    """The dtype with the fewest digits among what a step keeps for its backward pass, autocast included."""
    dtypes = {p.dtype for p in variant.parts.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.loss(batch)
    known = [dtype for dtype in TOLERANCE if dtype in dtypes]
    return known[-1] if known else torch.float32
