"""Set-up of every test: the Triton interpreter where there is no GPU, and fresh memory that holds NaN, not zeros."""

from __future__ import annotations

import os

# Read when torch is imported. Two workers with two threads each share two cores: threads that spin while they wait for
# work take a core from the other worker (channel_scores, compose and channel_step: 117 instead of 61 s of CPU).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, thus before petl_kernels

torch.set_num_threads(2)


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            import triton_interpreter
        except ImportError:  # no Triton for this platform: its tests skip themselves
            return
        triton_interpreter.install()


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """Fresh memory holds NaN (`torch.utils.deterministic.fill_uninitialized_memory`), so unwritten elements show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random BERT with a word-piece vocabulary of the most frequent letters, saved as transformers does."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder
