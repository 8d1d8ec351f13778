"""Targets that tests/test_profile.py profiles: tiny models, right and wrong ways to return them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from petl_kernels import attach
from petl_kernels.testing.models import BERT, Encoder, Size, ViT

SIZE = Size(32, 2, 4, 6, vocabulary=50, classes=3)
VIT = Size(32, 2, 4, 5, True, patch=16, image=32, classes=3)


class Adapter(nn.Module):
    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)

    def forward(self, x):
        return x + self.up(F.gelu(self.down(x)))


class Odd(nn.Module):
    """What no pattern matches: two inputs multiplied."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * self.weight.sigmoid() * x.sigmoid()


def small_bert() -> Encoder:
    return BERT(SIZE)


def small_vit() -> Encoder:
    return ViT(VIT)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(model):
    return model.batch(4, "cpu"), torch.tensor([0, 1, 2, 0])


def by_hand(adapters=True):
    model = small_bert().requires_grad_(False)
    model.head.requires_grad_(True)
    if adapters:
        for block in model.blocks:
            block.after_attention, block.after_ffn = Adapter(32, 8), Adapter(32, 8)
    return model, data(model), loss


def build():
    return by_hand()


def attached():
    model = small_bert()
    attach(model, "parallel", bottleneck=8)
    return model, data(model), loss


def unknown():
    model = small_bert().requires_grad_(False)
    model.blocks[1].after_ffn = Odd(32)
    return model, data(model), loss


def loaded():
    model, (inputs, labels), _ = build()
    return model, DataLoader(list(zip(inputs, labels)), batch_size=2), loss


def drained():
    model, batch, _ = build()
    return model, (batch for _ in range(2)), loss


def adapters_library():
    import adapters
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config)
    adapters.init(model)
    model.add_adapter("a", config=adapters.DoubleSeqBnConfig(reduction_factor=4))
    model.train_adapter("a")
    return model, {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}, by_mapping


def by_mapping(model, batch):
    return model(**batch).loss


def peft_library():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(small_bert(), lora)
    return model, data(model.base_model.model), loss


def two():
    return small_bert(), None


def no_model():
    return None, None, loss


def no_loss():
    return small_bert(), None, 3


def nothing_trains():
    return small_bert().requires_grad_(False), None, loss


def vector():
    model, batch, _ = build()
    return model, batch, lambda model, batch: model(batch[0])


def broken_step():
    model, batch, _ = build()
    return model, batch, lambda model, batch: model(batch)


def broken():
    raise RuntimeError("no such checkpoint")


LIST = [1]
