"""Scores of channels from what goes through a model: Taylor expansion of the loss, or SCT's norms."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petl_kernels._names import Where, check_model, find_modules, some
from petl_kernels.ops.channel_importance import channel_importance

SIDES = ("output", "input")
REDUCTIONS = ("sq_batch", "sq_sample", "abs")


def score_channels(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    where: Where | None = None,
    *,
    side: str = "output",
    reduction: str = "sq_batch",
    impl: str | None = None,
) -> dict[str, Tensor]:
    """First-order Taylor scores of the channels of some modules, summed over batches in fp32 (fp64 for fp64).

    With a an activation [B, ..., d] and g the loss's gradient with respect to it, `g * a` is, to first order, what the
    loss loses when that element is set to 0. `petl_kernels.channel_importance` sums it up in one of three ways; see
    there. Which one TTC-Tuning (arXiv:2303.07910) used is not public: the form and the default, "sq_batch", are ours,
    after Molchanov et al. 2019 (arXiv:1906.10771). A loss that is the mean over a batch scales g by the batch's size:
    batches should be of one size.

    The model is scored as it stands (TTC: after stage 1), in eval mode. Parameters are frozen meanwhile, so that their
    gradients are neither computed nor touched; `requires_grad`, training modes, hooks and random state are afterwards
    as they were, whatever `loss_fn` raises. Memory: the chosen activations live until the backward of their batch.

    Args:
        model: any module.
        batches: whatever `loss_fn` takes, any number of them.
        loss_fn: `(model, batch) -> scalar loss`.
        where: a predicate `(name, module) -> bool`, or names and glob patterns. By default every nn.Linear whose weight
            is frozen: a head that trains anyway needs no selection.
        side: "output" scores output channels (`tune_channels(dim=0)`), "input" the channels of the first argument
            (dim=1).
        reduction: "sq_batch", "sq_sample" or "abs".
        impl: passed on to `petl_kernels.channel_importance`.

    Returns:
        Module name -> scores [d] on the activation's device, in the model's order. A module that runs several times in
        a forward gets the sum of the scores of its runs.

    Raises:
        TypeError, ValueError: bad arguments, `where` that picks nothing, a loss that is not a scalar.
        RuntimeError: a chosen module did not run (no batches?), or no gradient reached it in any batch: the loss does
            not depend on it, or it ran under no_grad, as under reentrant checkpointing when no input of the block
            requires a gradient. Also, from autograd, when an activation is changed in place afterwards, as by
            `ReLU(inplace=True)`.
    """
    _check_choices("score_channels", side=(side, SIDES), reduction=(reduction, REDUCTIONS))
    check_model("score_channels", model)
    if where is None and not any(_frozen_linear(*named) for named in model.named_modules()):
        raise ValueError("score_channels: no nn.Linear is frozen; give `where`, or freeze as tune_layer_norms does")
    chosen = find_modules("score_channels", model, _frozen_linear if where is None else where)
    totals: dict[str, Tensor] = {}
    ran: set[str] = set()

    def tap(name: str, activation: Tensor) -> Tensor:
        ran.add(name)
        return _Tap.apply(activation, anchor, add(name)) if torch.is_grad_enabled() else activation

    def add(name: str) -> Callable[[Tensor, Tensor], None]:
        def score(activation: Tensor, grad: Tensor) -> None:
            value = channel_importance(activation, grad, reduction=reduction, impl=impl)
            _accumulate("score_channels", totals, name, value)

        return score

    with _scoring(model), torch.enable_grad(), _observed("score_channels", chosen, side, tap):
        for batch in batches:
            anchor = torch.zeros((), requires_grad=True)  # what makes every tapped activation part of a graph
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"score_channels: loss_fn must return a scalar tensor, got {_describe(loss)}")
            if loss.requires_grad:
                loss.backward()
            del loss
    _check_all("score_channels", chosen, ran, totals)
    return {name: totals[name] for name in chosen}


def score_channels_l2(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any],
    labels_fn: Callable[[Any], Any],
    where: Where,
    *,
    side: str = "output",
    skip_tokens: int = 0,
    mask_fn: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """SCT's scores without gradients (arXiv:2309.08513, as its code computes them).

    For each class the L2 norm of a channel over all its images and tokens; then the mean over classes. Features come
    from the model in eval mode, without gradients; modes, hooks and random state are afterwards as they were. Sums are
    kept in fp64.

    Args:
        model: any module; SCT uses the pretrained one.
        batches: whatever `forward_fn` and `labels_fn` take.
        forward_fn: `(model, batch) -> anything`: runs the model.
        labels_fn: `batch -> class of each sample`, an integer tensor [B] or a sequence.
        where: a predicate `(name, module) -> bool`, or names and glob patterns. SCT scores the input of `norm2` in
            each block (`side="input"`), or outputs of blocks or of `qkv`.
        side: "output" or "input", whose channels are scored; activations are [B, ..., d].
        skip_tokens: how many leading tokens to leave out; SCT leaves out the class token, 1.
        mask_fn: `batch -> bool [B, tokens]`, the tokens that count: text has padding, images have not.

    Returns:
        Module name -> fp32 scores [d], in the model's order.

    Raises:
        TypeError, ValueError: bad arguments, labels or mask that do not fit the activations.
        RuntimeError: a chosen module did not run.
    """
    _check_choices("score_channels_l2", side=(side, SIDES))
    if isinstance(skip_tokens, bool) or not isinstance(skip_tokens, int) or skip_tokens < 0:
        raise ValueError(f"score_channels_l2: skip_tokens must be an integer of at least 0, got {skip_tokens!r}")
    chosen = find_modules("score_channels_l2", model, where)
    squares: dict[str, dict[Hashable, Tensor]] = {}
    labels: list[Hashable] = []
    mask: Tensor | None = None

    def observe(name: str, activation: Tensor) -> Tensor:
        kept = _kept_tokens(name, activation.detach(), len(labels), mask, skip_tokens)
        sums = squares.setdefault(name, {})
        for label in dict.fromkeys(labels):
            of_class = torch.tensor([each == label for each in labels], device=kept.device)
            value = kept[of_class].flatten(0, -2).square().sum(0)
            _accumulate("score_channels_l2", sums, label, value)
        return activation

    with _scoring(model), torch.no_grad(), _observed("score_channels_l2", chosen, side, observe):
        for batch in batches:
            given = labels_fn(batch)
            labels[:] = given.tolist() if isinstance(given, Tensor) else list(given)
            mask = None if mask_fn is None else mask_fn(batch)
            forward_fn(model, batch)
    _check_all("score_channels_l2", chosen, set(squares), squares)
    return {name: torch.stack([s.sqrt() for s in squares[name].values()]).mean(0).float() for name in chosen}


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows activation and gradient to `score`."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, anchor: Tensor, score: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.score = score
        return activation.view_as(activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.score(activation, grad)
        return grad, None, None


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with frozen parameters, and as it was afterwards, random state included."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, mode in modes:  # parents come first; `train` may do more than set the flag
                if module.training != mode:
                    module.train(mode)


@contextmanager
def _observed(
    op: str, modules: dict[str, nn.Module], side: str, observe: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Pass the activations of one side of the modules through `observe` while the context is open."""

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if type(output) not in (tuple, list):
                return observe(name, _activation(op, name, side, [output]))
            return type(output)([observe(name, _activation(op, name, side, output)), *output[1:]])

        return hook

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (observe(name, _activation(op, name, side, args)), *args[1:]), kwargs
            first = next(iter(kwargs), "")
            return args, {**kwargs, first: observe(name, _activation(op, name, side, list(kwargs.values())))}

        return hook

    handles = []
    try:
        for name, module in modules.items():
            if side == "output":
                handles.append(module.register_forward_hook(after(name)))
            else:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation(op: str, name: str, side: str, values: Any) -> Tensor:
    first = values[0] if len(values) else None
    if isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2:
        return first
    raise TypeError(f"{op}: the {side} of {name!r} must be a floating-point tensor [.., d], got {_describe(first)}")


def _kept_tokens(name: str, activation: Tensor, samples: int, mask: Tensor | None, skip: int) -> Tensor:
    """The activations that count, fp64 [samples, tokens, d], those of masked tokens 0."""
    if activation.shape[0] != samples:
        raise ValueError(f"score_channels_l2: {samples} labels, but {name!r} has {list(activation.shape)}")
    kept = activation.to(torch.float64).reshape(samples, -1, activation.shape[-1])
    if mask is not None:
        if mask.shape != kept.shape[:2]:
            raise ValueError(f"score_channels_l2: mask {list(mask.shape)}, but {name!r} has {list(activation.shape)}")
        kept = kept * mask.to(kept.device).unsqueeze(-1)
    return kept[:, skip:]


def _accumulate(op: str, totals: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    before = totals.get(key)
    if before is not None and before.shape != value.shape:
        raise ValueError(f"{op}: {key!r} has {len(value)} channels now and had {len(before)} before")
    totals[key] = value if before is None else before + value


def _check_choices(op: str, **choices: tuple[Any, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}")


def _check_all(op: str, chosen: dict[str, nn.Module], ran: set[str], scored: Any) -> None:
    if not ran:
        raise RuntimeError(f"{op}: none of the modules ran; are there any batches?")
    if idle := [name for name in chosen if name not in ran]:
        raise RuntimeError(f"{op}: no batch went through the forward of {some(idle)}; narrow `where`")
    if unreached := [name for name in chosen if name not in scored]:
        raise RuntimeError(
            f"{op}: no gradient reached {some(unreached)}: the loss does not depend on them (narrow `where`), or they "
            "ran under no_grad, as under reentrant checkpointing (use_reentrant=False)"
        )


def _frozen_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
