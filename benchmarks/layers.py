"""Time each method's layer beside the library's own module: `python benchmarks/layers.py --csv out.csv`.

Forward and backward of one layer, x needing a gradient as in the middle of a model: the module of `adapters` or `peft`,
its compilation, the same module after `fuse` where `fuse` knows it, and the layer of `petl_kernels.nn` with the same
weights. Correctness comes first: where outputs or gradients differ, nothing is timed and the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import petl_kernels
from petl_kernels.benchmarking.options import DTYPES, own_inductor_cache, some_of
from petl_kernels.benchmarking.provenance import provenance
from petl_kernels.benchmarking.report import Measurement, print_group, print_origin, save
from petl_kernels.benchmarking.timing import Call, ceilings, interleave
from petl_kernels.nn import AdapterPlus, BottleneckAdapter, IA3Linear, LoRALinear, LoRAMergedLinear, ParallelAdapter
from petl_kernels.profiling import saved_bytes

NAMES = ("float32", "bfloat16")  # of the dtypes
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Pair:
    """One method in two libraries.

    Attributes:
        name: of the method, with its size.
        library: what is called with x; of `lora qv`, the usual lines that no library holds.
        ours: likewise.
        modules: theirs and ours, whose parameters train.
        flops: of forward and backward together, per token.
        fused: another one of the library's modules, after `fuse`; None where `fuse` does not know it.
        width: of the output, where it is not that of x.
    """

    name: str
    library: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, nn.Module]
    flops: int
    fused: nn.Module | None = None
    width: int | None = None


def bottleneck(name: str, d: int, r: int, kind: str, ours: BottleneckAdapter, **config: Any) -> Pair:
    """An adapter of the `adapters` library and ours, with its weights."""
    from adapters import BnConfig
    from adapters.methods.modeling import Adapter, ParallelAdapter

    defaults = dict(mh_adapter=False, output_adapter=True, reduction_factor=d / r, non_linearity="relu")
    theirs = {"Adapter": Adapter, "ParallelAdapter": ParallelAdapter}[kind](
        "a", d, r, BnConfig(**{**defaults, **config})
    )
    theirs = theirs.to(ours.w_down.dtype)
    down, up = theirs.adapter_down[0], theirs.adapter_up
    with torch.no_grad():
        for mine, own in zip((ours.w_down, ours.b_down, ours.w_up, ours.b_up), (*down.parameters(), *up.parameters())):
            assert mine is not None
            own.copy_(mine)
    if kind == "Adapter":
        return Pair(name, lambda x: theirs(x, residual_input=x)[0], ours, (theirs, ours), 12 * d * r)
    # Its caller adds the sub-layer's output, for which x stands here.
    return Pair(name, lambda x: theirs(x, residual_input=x)[0] + x, lambda x: ours(x, x), (theirs, ours), 12 * d * r)


def linear(name: str, d: int, config: Any, ours: nn.Module, weights: Callable[[Any], list[Tensor]]) -> Pair:
    """A tuned linear of `peft` and ours, over one frozen weight."""
    from peft import inject_adapter_in_model

    base = nn.Linear(d, d, dtype=ours.weight.dtype)  # type: ignore[arg-type]
    base.weight, base.bias = ours.weight, ours.bias  # type: ignore[assignment]
    model: Any = inject_adapter_in_model(config, nn.ModuleDict({"layer": base})).to(base.weight.dtype)
    theirs = model["layer"]
    own = [p for p in ours.parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, other in zip(own, weights(theirs)):
            other.copy_(mine.view_as(other))
    trained = sum(p.numel() for p in own)
    return Pair(name, theirs, ours, (theirs, ours), 4 * d * d + 6 * trained)


def sliced(name: str, ours: LoRAMergedLinear) -> Pair:
    """LoRA on queries and values of a fused projection: the usual added slices, with our weights, and ours."""
    d, r = ours.in_features, ours.rank
    down_q, down_v = ours.w_down.chunk(2)
    up_q, up_v = ours.w_up.chunk(2)

    def usual(x: Tensor) -> Tensor:
        qkv = F.linear(x, ours.weight, ours.bias)
        qkv[..., :d] += F.linear(F.linear(x, down_q), up_q) * ours.scale
        qkv[..., 2 * d :] += F.linear(F.linear(x, down_v), up_v) * ours.scale
        return qkv

    return Pair(name, usual, ours, (ours, ours), 12 * d * d + 24 * d * r, width=3 * d)


def pairs(d: int, dtype: torch.dtype) -> Iterator[Pair]:
    """Every method that a library has too, in the sizes of its presets at this width."""
    from peft import IA3Config, LoraConfig

    torch.manual_seed(0)
    own = dict(init="bert", dtype=dtype)
    seq = BottleneckAdapter(d, d // 16, activation="silu", **own)  # type: ignore[arg-type]
    yield bottleneck("houlsby d/16", d, d // 16, "Adapter", seq, non_linearity="swish")
    wide = ParallelAdapter(d, d // 2, **own)  # type: ignore[arg-type]
    yield bottleneck("parallel d/2", d, d // 2, "ParallelAdapter", wide, is_parallel=True, scaling=4.0)
    plus = AdapterPlus(d, d // 96, **own).eval()  # type: ignore[arg-type]
    options = dict(non_linearity="gelu", scaling="channel")
    yield bottleneck("adapter+ d/96", d, d // 96, "Adapter", plus, **options)
    for rank in (8, 64):
        lora = LoRALinear.from_linear(nn.Linear(d, d, dtype=dtype), rank)
        nn.init.normal_(lora.w_up, std=0.02)
        tuner = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
        pair, again = (linear(f"lora {rank}", d, tuner, lora, _lora_weights) for _ in range(2))
        petl_kernels.fuse(nn.ModuleDict({"layer": again.modules[0]}))
        yield replace(pair, fused=again.modules[0])
    qv = LoRAMergedLinear.from_linear(nn.Linear(d, 3 * d, dtype=dtype), 8, ((0, d), (2 * d, 3 * d)), alpha=16)
    nn.init.normal_(qv.w_up, std=0.02)
    yield sliced("lora qv 8", qv)
    ia3 = IA3Linear.from_linear(nn.Linear(d, d, dtype=dtype))
    nn.init.normal_(ia3.scale, 1.0, 0.1)
    config = IA3Config(target_modules=["layer"], feedforward_modules=[])
    yield linear("ia3", d, config, ia3, lambda m: [m.ia3_l["default"]])


def _lora_weights(layer: Any) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def step(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, g: Tensor) -> Call:
    """Forward and backward to x and to all that trains."""
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(call(x), leaves, g)


def difference(pair: Pair, x: Tensor, g: Tensor) -> float:
    """The largest difference of the outputs and of dx, relative to the largest element."""
    both = []
    for call, module in ((pair.library, pair.modules[0]), (pair.ours, pair.modules[1])):
        y = call(x)
        both.append((y.detach(), step(call, module, x, g)()[0]))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*both))


def measure(
    pair: Pair, n: int, d: int, dtype: str, compile: bool, seconds: float, repeats: int | None
) -> list[Measurement]:
    """Time a step of every provider of one method."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(n, w, generator=generator).to(DTYPES[dtype]) for w in (d, pair.width or d))
    x.requires_grad_()
    theirs, ours = pair.modules
    calls = {"library": (pair.library, theirs)}
    if compile:
        calls["compile"] = (torch.compile(pair.library), theirs)
    if pair.fused is not None:
        calls["fused"] = (pair.fused, pair.fused)
    calls["petl_kernels"] = (pair.ours, ours)
    steps = {name: step(call, module, x, g) for name, (call, module) in calls.items()}
    limits, times = ceilings(DTYPES[dtype], "cpu"), interleave(steps, "cpu", seconds, repeats)
    sample = {"id": pair.name, "n": n, "d": d, "method": pair.name}
    found = []
    for name, (call, module) in calls.items():
        held = saved_bytes(lambda call=call: call(x), exclude=module.parameters())  # type: ignore[misc]
        # x, y and g are read or written once or twice, as wide as they are.
        work = (n * pair.flops, n * (3 * d + 2 * (pair.width or d)) * DTYPES[dtype].itemsize)
        found.append(Measurement("layers", name, "full", sample, dtype, times[name], *work, limits, held))
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Rows of x.")] = 4096,
    width: Annotated[int, typer.Option(help="d.")] = 768,
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}.")] = "float32,bfloat16",
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    compile: Annotated[bool, typer.Option(help="Also time the library's module compiled.")] = True,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per method.")] = 4.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
) -> None:
    """Check, then time both libraries' modules in interleaved rounds."""
    own_inductor_cache()
    torch.set_num_threads(threads or torch.get_num_threads())
    dtypes = some_of("--dtype", dtype, NAMES)
    origin = provenance("cpu")
    print_origin(console, origin)
    wrong, found = [], []
    for name in dtypes:
        bound = 1e-5 if name == "float32" else 4e-2
        for pair in pairs(width, DTYPES[name]):
            x, g = (torch.randn(64, w).to(DTYPES[name]) for w in (width, pair.width or width))
            if not (off := difference(pair, x.requires_grad_(), g)) <= bound:
                wrong.append(f"{pair.name} {name}: off by {off:.1e}")
    if wrong:
        console.print("Wrong results, so nothing is timed:", *wrong, sep="\n  ", markup=False)
        raise typer.Exit(1)
    for name in dtypes:
        torch._dynamo.reset()
        group = []
        for pair in pairs(width, DTYPES[name]):
            group += measure(pair, tokens, width, name, compile, seconds, repeats)
        print_group(console, group, baselines=["library", "compile"])
        found += group
    save(console, csv, found, origin)


if __name__ == "__main__":
    typer.run(main)
