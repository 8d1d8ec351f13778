"""Small random models of the `peft` library and how two runs of one are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from whole_models import SEEDS

from petl_kernels import bottleneck_adapter
from petl_kernels.testing import Outcome

peft = pytest.importorskip("peft", exc_type=Exception)
transformers = pytest.importorskip("transformers", exc_type=Exception)
from peft.tuners.lora.layer import Linear  # noqa: E402

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TARGETS = {
    "Bert": ["query", "value"],
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
KERNELS = ["cpp", "triton"]
# Triton's interpreter takes 2 s for what the others do in 10 ms: it runs where its arithmetic is another.
IMPLS = ["cpp", "reference"]


def base_model(arch: str = "Bert", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if arch == "Bert":
        options |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if arch == "GPT2":
        sizes = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    head = "BertForMaskedLM" if arch == "Bert" else f"{arch}ForCausalLM"
    return getattr(transformers, head)(getattr(transformers, f"{arch}Config")(**SIZES, **options))


_TRAINED = ("lora_", "ia3_l", "ln_tuning_layers", "vera_lambda", "shira_weight")


def randomize(model: nn.Module, seed: int = 3) -> nn.Module:
    """Adapters at random: a fresh B is zero, and with it most gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in _TRAINED):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def lora(arch: str = "Bert", **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[arch], **options})


def build(arch: str = "Bert", names: tuple[str, ...] = ("default",), dtype=torch.float32, **options: Any) -> Any:
    """A PeftModel with LoRA adapters of these names, the first of them active."""
    model = peft.get_peft_model(base_model(arch).to(dtype), lora(arch, **options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(arch, **options))
    return randomize(model).eval()


def run_model(model: nn.Module, **kwargs: Any) -> Outcome:
    """Logits and the gradient of everything that trains."""
    tokens = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=tokens, **kwargs).logits
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named or not logits.requires_grad:
        return Outcome(logits.detach())
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    grads = torch.autograd.grad((logits * weight).sum(), list(named.values()), allow_unused=True)
    return Outcome(logits.detach(), {n: g for n, g in zip(named, grads) if g is not None})


def run_draws(model: nn.Module, exact: bool = False) -> list[Outcome]:
    """A run for each draw of what trains, in float64 where it is to be exact."""
    draws = (randomize(model, seed) for seed in SEEDS)
    return [run_model(copy.deepcopy(drawn).double() if exact else drawn) for drawn in draws]


def assert_equal(ours: Outcome, theirs: Outcome, tolerance: float = 0.0) -> None:
    """Every tensor equal to `tolerance` times its largest element; bit for bit where the library computed it."""
    assert ours.grads.keys() == theirs.grads.keys()
    for (name, got), (_, wanted) in zip(ours.items(), theirs.items()):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), f"{name}: {error:.3g} of {largest:.3g}"


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Linear)]


def replace_parts(model: nn.Module, part: str, make: Callable[[Any], Any]) -> None:
    for layer in layers(model):
        parts = getattr(layer, part)
        for name in parts:
            parts[name] = make(parts[name])


def count_op_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that from now on grows by the `impl` of every call of the op by a fused layer."""
    calls: list[str] = []

    def counted(*args, **kwargs):
        calls.append(kwargs["impl"])
        return bottleneck_adapter(*args, **kwargs)

    monkeypatch.setattr("petl_kernels.integrations.peft._tuner.bottleneck_adapter", counted)
    return calls
