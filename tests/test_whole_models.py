"""The rule for whole models lets no fault through that a fused model might have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_models import PRESETS, build, randomize, run_model
from whole_models import SEEDS, worse

from petl_kernels import bottleneck_adapter
from petl_kernels.integrations import fuse
from petl_kernels.testing import Outcome


def _draws(model: torch.nn.Module, exact: bool = False) -> list[Outcome]:
    outcomes = []
    for seed in SEEDS:
        randomize(model, seed)
        outcomes.append(run_model(copy.deepcopy(model).double() if exact else model))
    return outcomes


_NAMES = ("x", "w_down", "b_down", "w_up", "b_up")
_FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "no bias": {"b_up": lambda b: b - b.detach()},
    "hardly a gradient of the bias": {"b_up": lambda b: b.detach() + (b - b.detach()) / 1000},
    "scale": {"scale": lambda s: 1.02 * s},
    "activation": {"activation": lambda _: "gelu_tanh"},
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_faults(fault, monkeypatch):
    model = build("bert", PRESETS["channel"]).eval()
    theirs, exact = _draws(model), _draws(model, exact=True)

    def faulty(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = dict(zip(_NAMES, args)) | kwargs
        return bottleneck_adapter(**call | {name: change(call[name]) for name, change in _FAULTS[fault].items()})

    # No impl is asked for, so that sites of this size leave the norm to PyTorch.
    monkeypatch.setattr("petl_kernels.integrations.adapters.bottleneck.bottleneck_adapter", faulty)
    fuse(model, strict=True)
    assert (worse(_draws(model), theirs, exact) is None) == (fault == "none")
