"""How a method's module enters an attention: in the place of its softmax over keys, or beside its heads.

Queries, keys and heads are no module's output, and not even the same in number everywhere (caches, rotations, fused
projections). So the attention's own forward runs as it is, and what it hands to PyTorch is taken up there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petl_kernels.methods.insertions import Insertion, first, leave, link, occupy, of_first
from petl_kernels.nn.lora_merged import is_conv1d
from petl_kernels.nn.multihead_attention import attend


class Inside(Insertion):
    """`module(query, key, value, ...)` in the place of `F.scaled_dot_product_attention` within the attention `at`.

    The module gets what the attention attends to: keys after their rotation and with those of a cache, the mask, the
    dropout. An attention that does not call this function raises at its forward. nn.MultiheadAttention is computed
    here, because a mode does not see into PyTorch's function for it.
    """

    def insert(self, model: nn.Module) -> Callable[[], None]:
        core = occupy(model, self.at, self.module)
        before = vars(core).get("forward")
        core.forward = own = partial(_inside, core, before)
        # nn.TransformerEncoderLayer has a fast path, which reads weights past every forward unless there is a hook.
        handle = core.register_forward_pre_hook(_nothing)

        def remove() -> None:
            if vars(core).get("forward") is not own:
                raise RuntimeError(f"detach: the forward of {self.at!r} is no longer the one that attach put there")
            leave(core, handle)
            del core.forward
            if before is not None:
                core.forward = before

        return remove


@dataclass(frozen=True)
class OnHeads(Insertion):
    """`heads + module(x, q_proj)` as the heads of the attention `at`; x is its first argument.

    Attributes:
        query: its query projection, or None where it is the first part of `qkv` or nn.MultiheadAttention's own.
        qkv: its fused projection.
        output: its output projection, or None where nn.MultiheadAttention reads the weight without calling it.
    """

    query: str | None = None
    qkv: str | None = None
    output: str | None = None

    def insert(self, model: nn.Module) -> Callable[[], None]:
        core = occupy(model, self.at, self.module)
        end: Any = core if self.output is None else model.get_submodule(self.output)
        unlink = link(core, end)
        within = len(self.at) + 1
        ask = partial(_ask, query=self.query and self.query[within:], qkv=self.qkv and self.qkv[within:])
        added = (
            core.register_forward_hook(_add_output)
            if self.output is None
            else end.register_forward_pre_hook(_add_to_heads)
        )
        handles = (core.register_forward_pre_hook(ask, with_kwargs=True), added)

        def remove() -> None:
            leave(core, *handles)
            unlink()

        return remove


class _InPlaceOfAttention(TorchFunctionMode):
    """Passes calls of `F.scaled_dot_product_attention` on to a module, and notes them."""

    def __init__(self, module: nn.Module, calls: list[int]) -> None:
        super().__init__()
        self.module, self.calls = module, calls  # a list of the caller's: Dynamo forgets what a mode sets on itself

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls.append(1)
        return self.module(*args, **(kwargs or {}))


def _inside(core: Any, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention in which a module computes the heads. `before`: a forward that somebody had set."""
    if before is None and isinstance(core, nn.MultiheadAttention):
        return _multihead(core, *args, **kwargs)
    calls: list[int] = []
    with _InPlaceOfAttention(core.petl, calls):
        output = type(core).forward(core, *args, **kwargs) if before is None else before(*args, **kwargs)
    if len(calls) != 1:
        raise RuntimeError(
            f"attach: {type(core.petl).__name__} stands in for F.scaled_dot_product_attention, which "
            f"{type(core).__name__} called {len(calls)} times; load the model with attn_implementation='sdpa' and ask "
            "for no attention weights"
        )
    return output


def _multihead(
    core: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """The forward of nn.MultiheadAttention. `is_causal` is a hint beside the mask, which says it all."""
    if need_weights or (attn_mask is None and is_causal):
        wanted = "need_weights=False, and attn_mask with is_causal"
        raise ValueError(f"attach: {type(core.petl).__name__} in MultiheadAttention wants {wanted}")
    biases = (None,) * 3 if core.in_proj_bias is None else core.in_proj_bias.chunk(3)
    projected = [F.linear(*each) for each in zip((query, key, value), core.in_proj_weight.chunk(3), biases)]
    return attend(core, projected, key_padding_mask, attn_mask, core.petl), None


def _nothing(core: Any, args: Any) -> None:
    pass


def _ask(core: Any, args: Any, kwargs: Any, query: str | None, qkv: str | None) -> None:
    core.petl_input.value = core.petl(first(args, kwargs), _projection(core, query, qkv))


def _projection(core: Any, query: str | None, qkv: str | None) -> Callable[[Tensor], Tensor]:
    if query is not None:
        return core.get_submodule(query)
    if qkv is None:
        weight, bias = core.in_proj_weight, core.in_proj_bias
    else:
        weight, bias = (fused := core.get_submodule(qkv)).weight, fused.bias
        weight = weight.t() if is_conv1d(fused) else weight
    d = core.petl.d_model  # queries are first, and as wide as the model
    return lambda x: F.linear(x, weight[:d], None if bias is None else bias[:d])


def _add_to_heads(output: Any, args: Any) -> Any:
    return (args[0] + output.petl_input.take(), *args[1:])


def _add_output(core: Any, args: Any, output: Any) -> Any:
    """What the output projection, a linear map, makes of the sum; its bias is in the output already."""
    return of_first(output, lambda y: y + F.linear(core.petl_input.take(), core.out_proj.weight))
