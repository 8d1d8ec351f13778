"""The unified view as a table: each method by its four design dimensions, its size and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from petl_kernels.methods import placements
from petl_kernels.methods.insertions import Insertion


@dataclass(frozen=True)
class Method:
    """A method of parameter-efficient transfer learning, as He et al. 2021 (arXiv:2110.04366, table 1) tell them apart.

    Attributes:
        name: by which `attach` knows it.
        form: how the change is computed from its input x.
        insertion: "sequential" (x is the sub-layer's output) or "parallel" (x is its input), or what is tuned in place.
        where: the representation that is changed.
        composition: how the change enters h.
        parameters: how many train in one block: an expression in d (the model's width), f (the feed-forward part's), a
            (attention sub-layers of the block), s (all its sub-layers), p, b and o (weights, biases and outputs of its
            linears) and the method's own options.
        source: the paper.
        place: `(model, block, **options) -> insertions`, or None where `attach` cannot place it and `module` has to be
            called by the model.
        module: the layer of `petl_kernels.nn`, or None where what is there trains.
        norms: whether the layer norms train as well.
    """

    name: str
    form: str
    insertion: str
    where: str
    composition: str
    parameters: str
    source: str
    place: Callable[..., Iterator[Insertion]] | None
    module: str | None = None
    norms: bool = False

    def count(self, **sizes: Any) -> int:
        """The parameters of one block: `parameters` evaluated with these sizes."""
        return eval(self.parameters, {"__builtins__": {}}, sizes)  # an expression of this table, not of a user


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the table, so that `attach` and `petl-kernels methods` know it.

    Raises:
        ValueError: there is one of that name.
    """
    if method.name in METHODS:
        raise ValueError(f"register: there is a method {method.name!r} already")
    METHODS[method.name] = method
    return method


_ADAPTER = "2*d*r + d + r"

for _method in (
    Method(
        "houlsby",
        "gelu(x W_down) W_up",
        "sequential",
        "attention, ffn",
        "h + dh",
        f"s*({_ADAPTER})",
        "arXiv:1902.00751",
        placements.houlsby,
        "BottleneckAdapter",
        norms=True,
    ),
    Method(
        "pfeiffer",
        "relu(x W_down) W_up",
        "sequential",
        "ffn, after its norm",
        "h + s dh",
        _ADAPTER,
        "arXiv:2005.00247",
        placements.pfeiffer,
        "PfeifferAdapter",
    ),
    Method(
        "parallel",
        "relu(x W_down) W_up",
        "parallel",
        "ffn",
        "h + s dh",
        _ADAPTER,
        "arXiv:2110.04366",
        placements.parallel,
        "ParallelAdapter",
    ),
    Method(
        "adaptformer",
        "relu(x W_down) W_up",
        "parallel, before the norm",
        "ffn",
        "h + s dh",
        _ADAPTER,
        "arXiv:2205.13535",
        placements.adaptformer,
        "AdaptFormer",
    ),
    Method(
        "adapter_plus",
        "gelu(x W_down) W_up",
        "sequential",
        "block",
        "h + s_c dh, a scale per channel",
        f"{_ADAPTER} + d",
        "arXiv:2406.06820",
        placements.adapter_plus,
        "AdapterPlus",
    ),
    Method(
        "low_rank_pal",
        "gelu(x W_down) W_up",
        "parallel",
        "block",
        "h + dh",
        _ADAPTER,
        "arXiv:1902.02671",
        placements.low_rank_pal,
        "LowRankPAL",
    ),
    Method(
        "lora",
        "x W_down W_up",
        "parallel",
        "attention, query and value",
        "h + s dh",
        "4*a*d*r",
        "arXiv:2106.09685",
        placements.lora,
        "LoRALinear",
    ),
    Method(
        "ia3",
        "l",
        "sequential",
        "attention, key and value; ffn, hidden",
        "l h",
        "2*a*d + f",
        "arXiv:2205.05638",
        placements.ia3,
        "IA3Linear",
    ),
    Method(
        "sct",
        "x_C W",
        "sequential",
        "stream after attention, channels C",
        "h_C + s dh",
        "k*k + k",
        "arXiv:2309.08513",
        placements.sct,
        "ChannelAdapter",
    ),
    Method(
        "diff_pruning",
        "z w",
        "in place",
        "linears, entries z_e and rows z_r: z = z_e z_r",
        "(W + dh) x",
        "2*(p + b) + o",
        "arXiv:2012.07463",
        placements.diff_pruning,
        "DiffPruningLinear",
    ),
    Method(
        "layer_norm",
        "gamma, beta",
        "in place",
        "layer norms",
        "gamma h + beta",
        "0",
        "arXiv:2303.07910, stage 1",
        placements.nothing,
        norms=True,
    ),
    Method(
        "prefix",
        "softmax(x W_q P_k) P_v",
        "parallel",
        "attention, heads",
        "(1 - lam) h + lam dh",
        "2*a*l*d",
        "arXiv:2101.00190",
        placements.prefix,
        "PrefixAdapter",
    ),
    Method(
        "multi_head_parallel",
        "relu(x W_q P_k) P_v",
        "parallel",
        "attention, heads",
        "h + s dh",
        "a*(2*d*r + 2*d)",
        "arXiv:2110.04366",
        placements.multi_head_parallel,
        "MultiHeadParallelAdapter",
    ),
    Method(
        "mam",
        "prefix and scaled parallel",
        "parallel",
        "attention, heads; ffn",
        "as these",
        f"2*a*l*d + {_ADAPTER}",
        "arXiv:2110.04366",
        placements.mam,
        "MAM",
    ),
):
    register(_method)
