"""`accelerate`, the `Trainer` of transformers and Lightning fine-tune the demo's model with fused adapters."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("adapters", exc_type=Exception)
pytest.importorskip("transformers", exc_type=Exception)

from adapter_models import count_op_calls

import finetune
import sentiment
from petl_kernels import fuse

STEPS, BATCH, LR = 6, 8, 3e-3


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=1e-4)


def with_accelerate(model: nn.Module, examples: list[Any], folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(examples, BATCH, collate_fn=sentiment.collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    prepared.train()
    for batch in loader:
        accelerator.backward(prepared(**batch)[0])
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def with_transformers(model: nn.Module, examples: list[Any], folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    optimizers = optimizer_of(model), None
    Trainer(model, settings, sentiment.collate, train_dataset=examples, optimizers=optimizers).train()


def with_lightning(model: nn.Module, examples: list[Any], folder: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.model(**batch)[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    loader = torch.utils.data.DataLoader(examples, BATCH, collate_fn=sentiment.collate)
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=STEPS, default_root_dir=folder, **silent)
    trainer.fit(Module(), loader)


Trained = Callable[[nn.Module, list[Any], Path], None]
TRAINERS: dict[str, Trained] = {
    "accelerate": with_accelerate,
    "transformers": with_transformers,
    "lightning": with_lightning,
}


@pytest.mark.filterwarnings("ignore")  # of the libraries, about the number of workers and the like
@pytest.mark.parametrize("library", TRAINERS)
def test_fine_tunes_a_fused_model_as_the_librarys_own(library, model_folder, tmp_path, monkeypatch):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    op_calls = count_op_calls(monkeypatch)
    tokenizer, encoder = sentiment.load(model_folder)
    examples = sentiment.tokenize(tokenizer, sentiment.read_sentences(sentiment.DATA)[: STEPS * BATCH])
    eager = finetune.with_adapters(encoder, seed=0, reduction=4)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = copy.deepcopy(eager)
    assert len(fuse(fused, impl="cpp").fused) == 4
    before = {name: p.detach().clone() for name, p in eager.named_parameters()}
    TRAINERS[library](eager, examples, tmp_path)
    assert not op_calls
    TRAINERS[library](fused, examples, tmp_path)
    assert len(op_calls) == 4 * STEPS
    wanted = dict(eager.named_parameters())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
