"""Whole adapted models under what PyTorch has for training them: compilers, export, checkpointing, AMP, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_methods import IDENTITY, PLACED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers_models import LAYERS, D, make, shaken
from whole_models import worse

from petl_kernels import attach, use_impl
from petl_kernels.optim import ChannelAdamW
from petl_kernels.testing import Outcome
from petl_kernels.two_stage import Selection, tune_channels

METHODS = [*PLACED, "channels"]
SOME = ["houlsby", "lora", "ia3", "sct", "prefix", "channels"]  # one for each kind of insertion, and nn.ChannelLinear
OPTIONS = {
    **IDENTITY,
    "sct": dict(k=4),
    "adaptformer": dict(bottleneck=4, dropout=0.0),
    "diff_pruning": dict(alpha=0.3),  # gates that are not wide open, or they had no gradient
}


class Model(nn.Module):
    """Adapted blocks with the names of timm's ViT, and a head; `reentrant` True or False for checkpointed blocks."""

    def __init__(self, method: str, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.head, self.reentrant = make("timm", torch.float32), nn.Linear(D, 3), reentrant
        if method == "channels":
            widths = {
                f"blocks.{i}.{name}": d for i in range(LAYERS) for name, d in (("attn.qkv", 3 * D), ("mlp.fc2", D))
            }
            chosen = Selection({name: torch.tensor([5, 0, 3]) for name in widths}, widths)
            tune_channels(self, chosen, keep_trainable="head.*")
        else:
            report = attach(self.blocks, method, **OPTIONS[method])
            shaken(self.blocks, report.trained)
        self.eval()  # without the draws of what is random

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


def data(seed: int = 0, size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, 5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Outcome:
    """The outputs, and the gradients of their squares and of x."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x) if call is None else call(x)  # a compiled model has no truth
    y.to(x.dtype).square().sum().backward()
    return Outcome(y.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in trained(model).items()}})


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got: Outcome, wanted: Outcome, tolerance: float) -> None:
    assert got.grads.keys() == wanted.grads.keys() and len(got.grads) > 2
    for (name, value), (_, true) in zip(got.items(), wanted.items()):
        assert true.abs().max() > 0, name
        assert (value - true).abs().max() <= tolerance * true.abs().max(), name


@pytest.mark.parametrize("method", ["houlsby", "lora", "sct", "channels"])
def test_trains_compiled_whole(method):
    torch._dynamo.reset()
    models = Model(method), Model(method)
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(trained(model).values(), lr=0.05) for model in models]
    for step in range(3):
        x = data(step)
        assert_same(run(models[1], x, compiled), run(models[0], x), 1e-4)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("method", SOME)
def test_exports(method):
    model = Model(method)
    program = torch.export.export(model, (data(),), dynamic_shapes=({0: torch.export.Dim("samples")},)).module()
    x = data(1, size=7)
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("method, reentrant", [*((m, False) for m in METHODS), *((m, True) for m in SOME)])
def test_checkpointed(method, reentrant):
    plain, recomputed = Model(method).double(), Model(method, reentrant).double()
    x = data(dtype=torch.float64)
    assert_same(run(recomputed, x), run(plain, x), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    """By the rule for kernels: at most twice the error of PyTorch's own operators under the same autocast."""

    def cast(impl: str, of: torch.dtype, enabled: bool = True) -> Outcome:
        model = Model(method).to(of)
        with use_impl(impl), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return run(model, data(dtype=of))

    ours, eager = cast("auto", torch.float32), cast("reference", torch.float32)
    assert worse([ours], [eager], [cast("reference", torch.float64, enabled=False)]) is None


@pytest.mark.parametrize("method, fused", [*((m, False) for m in METHODS), ("sct", True), ("channels", True)])
def test_grad_scaler(method, fused):
    """A scaled step in fp16 is that without a scale, and one that overflows leaves everything as it is."""
    make_optimizer = ChannelAdamW if fused else torch.optim.AdamW
    model, plain = Model(method), Model(method)
    optimizers = [make_optimizer(list(trained(each).values()), lr=1e-2, eps=1e-3) for each in (model, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(scale: float = 1.0) -> None:
        optimizers[0].zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(data()).float().square().mean() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()

    step()
    with torch.autocast("cpu", torch.float16):
        plain(data()).float().square().mean().backward()
    optimizers[1].step()
    for (name, got), wanted in zip(trained(model).items(), trained(plain).values()):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3, msg=name)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    step(scale=float("inf"))
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())
    step()
    assert not any(torch.equal(p, before[name]) for name, p in trained(model).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_graph_of_a_training_step(method):
    """Captured once and replayed on new inputs, a step gives the gradients of an eager one."""
    with use_impl("auto"):
        model, static = Model(method).cuda(), data().cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # whatever is built or checked at a first call happens outside of the graph
                model.zero_grad()
                model(static).square().sum().backward()
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(static)
            y.square().sum().backward()
        for seed in (1, 2):
            static.copy_(data(seed))
            for p in trained(model).values():
                p.grad.zero_()
            graph.replay()
            got = [p.grad.clone() for p in trained(model).values()]
            eager = Model(method).cuda()
            wanted = eager(data(seed).cuda())
            wanted.square().sum().backward()
            torch.testing.assert_close(y, wanted)
            for grad, p in zip(got, trained(eager).values()):
                torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)
