"""Small random models of the `adapters` library, and how two runs of one are compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from petl_kernels import adapter_norm, bottleneck_adapter
from petl_kernels.integrations import FuseReport, fuse
from petl_kernels.ops._op import Op
from petl_kernels.testing import Outcome

adapters = pytest.importorskip("adapters", exc_type=Exception)
transformers = pytest.importorskip("transformers", exc_type=Exception)
from adapters.composition import Stack  # noqa: E402
from adapters.methods.bottleneck import BottleneckLayer  # noqa: E402

D = 16
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRESETS = {
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "channel": adapters.SeqBnConfig(reduction_factor=4, scaling="channel", non_linearity="gelu"),
}


def _usable_impls() -> list[str]:
    t = [torch.zeros(s) for s in ((1, 4), (2, 4), (2,), (4, 2), (4,))]
    op = Op.registry["bottleneck_adapter"]
    call = op.prepare(*t, residual=t[0], activation="relu", scale=1.0)
    return [name for name in op.impls if name != "triton" and op.unsupported(name, *call) is None]


IMPLS = _usable_impls()


def randomize(module: nn.Module, seed: int = 3) -> None:
    """Weights, biases, norms and scalings at random: freshly initialized adapters are close to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("adapter", "loras", "prefix")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.2)


def build(arch: str, config, names=("a",), **options) -> nn.Module:
    torch.manual_seed(0)
    if arch in ("bert", "roberta"):
        prefix = {"bert": "Bert", "roberta": "Roberta"}[arch]
        settings = getattr(transformers, f"{prefix}Config")(vocab_size=40, **SIZES, **NO_DROPOUT, **options)
        model = getattr(transformers, f"{prefix}Model")(settings)
    elif arch == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES, **NO_DROPOUT))
    elif arch == "gpt2":
        sizes = dict(vocab_size=40, n_embd=D, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        model = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    else:  # pre-norm decoders: llama has classes of its own, qwen2 is reached through forward hooks
        prefix = {"llama": "Llama", "qwen2": "Qwen2"}[arch]
        settings = getattr(transformers, f"{prefix}Config")(vocab_size=40, num_key_value_heads=2, **SIZES)
        model = getattr(transformers, f"{prefix}Model")(settings)
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=config)
    model.train_adapter(Stack(*names))
    model.set_active_adapters(names[0])
    randomize(model)
    return model


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.ViTModel):
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator).to(dtype)}
    return {"input_ids": torch.randint(3, 40, (4, 6), generator=generator)}


def run_model(model: nn.Module) -> Outcome:
    output = model(**inputs(model)).last_hidden_state
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output * weight).sum(), list(named.values()), allow_unused=True)
    return Outcome(output.detach(), {n: g for n, g in zip(named, grads) if g is not None})


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    """Every tensor equal to `tolerance` times its largest element (0.1 where norms cancel a gradient to less)."""
    assert ours.grads.keys() == theirs.grads.keys()
    for (name, got), (_, wanted) in zip(ours.items(), theirs.items()):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
        assert error <= tolerance * max(largest, 0.1), f"{name}: {error:.3g} of {largest:.3g}"


def assert_fuses(model: nn.Module, calls: list, per_forward: int, impl: str | None = None) -> FuseReport:
    """Fusing changes nothing but the number of op calls; fp64 leaves no room for another formula."""
    model = model.double()
    before, keys = run_model(model), list(model.state_dict())
    report = fuse(model, impl=impl)
    calls.clear()
    after = run_model(model)
    assert len(calls) == per_forward
    assert_same(after, before, 1e-11)
    assert list(model.state_dict()) == keys
    return report


def count_op_calls(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A list that from now on grows by the `impl` of every call of the op by a fused site."""
    calls: list[str | None] = []

    def counting(op):
        def counted(*args, **kwargs):
            calls.append(kwargs["impl"])
            return op(*args, **kwargs)

        return counted

    for module, op in (("bottleneck", bottleneck_adapter), ("lora", bottleneck_adapter), ("bottleneck", adapter_norm)):
        monkeypatch.setattr(f"petl_kernels.integrations.adapters.{module}.{op.__name__}", counting(op))
    return calls


def make_site(config: adapters.BnConfig) -> tuple[BottleneckLayer, nn.LayerNorm]:
    """One site outside any model, with one active adapter."""
    torch.manual_seed(0)
    settings = adapters.ModelAdaptersConfig()
    settings.add("a", config)
    settings.active_setup = Stack("a")
    site = BottleneckLayer("output_adapter")
    site.init_adapters(transformers.BertConfig(hidden_size=D), settings)
    site.add_adapter("a", 0)
    randomize(site.adapters)
    norm = nn.LayerNorm(D)
    nn.init.normal_(norm.weight)
    return site, norm


def bn_config(**options) -> adapters.BnConfig:
    defaults = dict(mh_adapter=True, output_adapter=True, reduction_factor=4, non_linearity="gelu")
    return adapters.BnConfig(**{**defaults, **options})


def run_site(site: nn.Module, norm: nn.Module | None, dtypes=(torch.float32, torch.float32)) -> Outcome:
    """Output and gradients for inputs of the given dtypes (of h and r), which hold the same numbers in each."""
    generator = torch.Generator().manual_seed(4)
    h, r = (torch.randn(2, 3, D, generator=generator).bfloat16().to(t).requires_grad_() for t in dtypes)
    output = site(h, r, norm)
    weight = (1 + torch.randn(output.shape, generator=generator) / 2).to(output.dtype)  # sums that do not cancel
    named = {"h": h, "r": r, **dict(site.named_parameters())}
    grads = torch.autograd.grad((output * weight).sum(), list(named.values()), allow_unused=True)
    return Outcome(output.detach(), {n: g for n, g in zip(named, grads) if g is not None})
