"""Time modules of `adapters` and `peft` before and after `fuse`: `python benchmarks/fused.py --csv out.csv`.

What benchmarks/layers.py cannot hold beside a layer of ours: forward and backward of the library's module, as it is,
compiled, and after `fuse`. Correctness comes first: where outputs or gradients differ, nothing is timed and the exit
code is 1.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import petl_kernels
from petl_kernels.benchmarking.options import DTYPES, own_inductor_cache, some_of
from petl_kernels.benchmarking.provenance import provenance
from petl_kernels.benchmarking.report import Measurement, print_group, print_origin, save
from petl_kernels.benchmarking.timing import Call, ceilings, interleave
from petl_kernels.profiling import saved_bytes

NAMES = ("float32", "bfloat16")  # of the dtypes
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Site:
    """A module of a library.

    Attributes:
        name: of its method.
        model: holds it and what it needs.
        call: the model and x -> the module's output, as wide as `width`.
        flops: of forward and backward together, per token.
    """

    name: str
    model: nn.Module
    call: Callable[[Any, Tensor], Tensor]
    flops: int
    width: int


def _adapted(kind: str, d: int, config: Any) -> Any:
    """A block of a model of `adapters`, in which an adapter of this configuration is active."""
    import adapters
    import transformers

    if kind == "bert":
        sizes = dict(hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 64, num_hidden_layers=1)
        model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=8, hidden_dropout_prob=0.0, **sizes))
    else:
        sizes = dict(n_embd=d, n_layer=1, n_head=d // 64)
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, resid_pdrop=0.0, **sizes))
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    return model


def _tuned(d: int, config: Any, norm: bool = False) -> Any:
    """A layer that `peft` tunes."""
    from peft import get_peft_model

    return get_peft_model(nn.ModuleDict({"layer": nn.LayerNorm(d) if norm else nn.Linear(d, d)}), config)  # type: ignore[arg-type]


def sites(d: int) -> Iterator[Site]:
    """Modules that `fuse` swaps and benchmarks/layers.py does not time, in the sizes of their presets."""
    import adapters
    import peft

    def bert(part: str) -> Callable[[Any, Tensor], Tensor]:
        return lambda model, x: model.encoder.layer[0].get_submodule(part)(x)

    def site(model: Any, x: Tensor) -> Tensor:
        output = model.encoder.layer[0].output
        return output.bottleneck_layer_forward(x, x, None)

    gated = adapters.SeqBnConfig(reduction_factor=16, use_gating=True)
    yield Site("adapters gated bottleneck", _adapted("bert", d, gated), site, 12 * d * (d // 16), d)
    lora = adapters.LoRAConfig(dropout=0.0)
    yield Site("adapters lora", _adapted("bert", d, lora), bert("attention.self.query"), 4 * d * d + 12 * d * 8, d)
    yield Site("adapters ia3", _adapted("bert", d, adapters.IA3Config()), bert("attention.self.value"), 4 * d * d, d)
    qv = lambda model, x: model.h[0].attn.c_attn(x)  # noqa: E731
    yield Site("adapters lora, merged qkv", _adapted("gpt2", d, lora), qv, 12 * d * d + 24 * d * 8, 3 * d)

    def layer(model: Any, x: Tensor) -> Tensor:
        return model.base_model.model["layer"](x)

    for name, config, flops, norm in (
        ("peft vera", peft.VeraConfig(target_modules=["layer"], r=256), 4 * d * d + 12 * d * 256, False),
        ("peft shira rows", _rows(peft, d), 4 * d * d + 2 * d * d // 8, False),
        ("peft layer norm", peft.LNTuningConfig(target_modules=["layer"]), 0, True),
    ):
        yield Site(name, _tuned(d, config, norm), layer, flops, d)


def _rows(peft: Any, d: int) -> Any:
    """SHiRA with a mask of whole rows, an eighth of them."""

    def mask(base: nn.Module, r: int, **kwargs: Any) -> Tensor:
        weight: Any = base.weight
        return torch.zeros_like(weight).index_fill_(0, torch.arange(0, d, 8), 1)

    config = peft.ShiraConfig(target_modules=["layer"], r=d // 16, mask_type="random")
    config.mask_fn = mask
    return config


def step(site: Site, model: nn.Module, x: Tensor, g: Tensor, compiled: bool = False) -> Call:
    """Forward and backward to x and to what trains and takes part."""
    call = torch.compile(site.call) if compiled else site.call
    trained = [p for p in model.parameters() if p.requires_grad]
    y = call(model, x)
    used = torch.autograd.grad(y, trained, g, allow_unused=True) if trained else ()
    leaves = [x, *(p for p, grad in zip(trained, used) if grad is not None)]
    assert len(leaves) > 1, site.name
    return lambda: torch.autograd.grad(call(model, x), leaves, g)


def difference(site: Site, fused: nn.Module, x: Tensor, g: Tensor) -> float:
    """The largest difference of output and gradients, relative to the largest element of each."""
    both = [[site.call(model, x).detach(), *step(site, model, x, g)()] for model in (site.model, fused)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*both, strict=True))


def randomize(model: nn.Module) -> nn.Module:
    """What trains, off its start, at which much is zero."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return model


def measure(
    site: Site, fused: nn.Module, n: int, d: int, dtype: str, compile: bool, seconds: float, repeats: int | None
) -> list[Measurement]:
    """Time a step of the module as it is, compiled, and fused."""
    x, g = _operands(n, d, site.width, DTYPES[dtype])
    steps = {"library": step(site, site.model, x, g), "fused": step(site, fused, x, g)}
    if compile:
        steps["compile"] = step(site, site.model, x, g, compiled=True)
    limits, times = ceilings(DTYPES[dtype], "cpu"), interleave(steps, "cpu", seconds, repeats)
    sample = {"id": site.name, "n": n, "d": d, "method": site.name}
    work = (n * site.flops, n * (3 * d + 2 * site.width) * DTYPES[dtype].itemsize)
    found = []
    for name, time in times.items():
        model = fused if name == "fused" else site.model
        held = saved_bytes(lambda model=model: site.call(model, x), exclude=model.parameters())  # type: ignore[misc]
        found.append(Measurement("fused", name, "full", sample, dtype, time, *work, limits, held))
    return found


def _operands(n: int, d: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and g, as samples of 128 tokens."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(max(n // 128, 1), min(n, 128), w, generator=generator).to(dtype) for w in (d, width))
    return x.requires_grad_(), g


def main(
    tokens: Annotated[int, typer.Option(help="Rows of x.")] = 4096,
    width: Annotated[int, typer.Option(help="d.")] = 768,
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}.")] = "float32,bfloat16",
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads.")] = None,
    compile: Annotated[bool, typer.Option(help="Also time the library's module compiled.")] = True,
    seconds: Annotated[float, typer.Option(help="Budget of the timed rounds per module.")] = 4.0,
    repeats: Annotated[int | None, typer.Option(help="Exact number of rounds instead.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the measurements here.")] = None,
) -> None:
    """Check, then time in interleaved rounds."""
    own_inductor_cache()
    torch.set_num_threads(threads or torch.get_num_threads())
    origin = provenance("cpu")
    print_origin(console, origin)
    found: list[Measurement] = []
    for name in some_of("--dtype", dtype, NAMES):
        torch._dynamo.reset()
        group: list[Measurement] = []
        for site in sites(width):
            torch.manual_seed(0)
            randomize(site.model.to(DTYPES[name]))
            fused = copy.deepcopy(site.model)
            assert petl_kernels.fuse(fused).fused, site.name
            off = difference(site, fused, *_operands(64, width, site.width, DTYPES[name]))
            if not off <= (1e-4 if name == "float32" else 8e-2):
                console.print(f"Wrong results, so nothing is timed: {site.name} {name}: off by {off:.1e}", markup=False)
                raise typer.Exit(1)
            group += measure(site, fused, tokens, width, name, compile, seconds, repeats)
        print_group(console, group, baselines=["library", "compile"])
        found += group
    save(console, csv, found, origin)


if __name__ == "__main__":
    typer.run(main)
