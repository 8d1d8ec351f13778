"""`make wheel`: the wheel in dist/ in clean environments, one for each PyTorch, where there is no compiler.

Not part of `make test`: environments with PyTorch are gigabytes. PETL_KERNELS_TEST_WHEEL names the versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DIST = Path(__file__).parent.parent / "dist"
VERSIONS = os.environ.get("PETL_KERNELS_TEST_WHEEL", "").split()
pytestmark = pytest.mark.skipif(not VERSIONS, reason="only in `make wheel`, which builds one")

TRAIN = """
import torch
from petl_kernels import explain, nn
from petl_kernels.testing import CASES, check

for case in CASES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        inputs = case.inputs(case.host, dtype)
        assert check(case, inputs, impl="cpp") == [], (case.name, dtype)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), nn.BottleneckAdapter(8, 4, impl="cpp"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x, losses = torch.randn(16, 8), []
for _ in range(20):
    loss = (torch.compile(model, fullgraph=True, backend="aot_eager")(x) - 1).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0]
print(torch.__version__)
"""


def wheel() -> Path:
    (found,) = DIST.glob("petl_kernels-*.whl")
    return found


def test_holds_kernels_and_no_sources():
    names = zipfile.ZipFile(wheel()).namelist()
    assert any(name.startswith("petl_kernels/_cpu.") for name in names) and "petl_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/")) or name.endswith(".cpp")]
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "Requires-Dist: torch>=" in zipfile.ZipFile(wheel()).read(metadata).decode()


@pytest.mark.parametrize("version", VERSIONS)
def test_installs_and_trains_without_a_compiler(version, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    binaries = environment / "bin"
    install = [binaries / "python", "-m", "pip", "install", "-q", f"torch=={version}", "--only-binary=:all:", wheel()]
    subprocess.run(install, check=True, env={**clean(), "PATH": f"{binaries}:/usr/bin:/bin"})
    # Nothing but the environment is on the path; what would call a compiler all the same is told of one that is not.
    alone = {**clean(), "PATH": str(binaries), "CC": "/no/compiler", "CXX": "/no/compiler"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    facts = json.loads(run(str(binaries / "petl-kernels"), "env", "--json"))
    assert facts["built"]["cpu"]["built"] and facts["versions"]["torch"].startswith(version)
    assert run(str(binaries / "python"), "-c", TRAIN).startswith(version)
    found = json.loads(run(str(binaries / "petl-kernels"), "bench", "channel_scale", "--quick", "--json"))
    assert {row["impl"] for row in found["rows"]} == {"eager", "cpp"} and found["provenance"]["commit"] == "unknown"


def clean() -> dict[str, str]:
    """This environment without what would lead to this tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PETL_", "TRITON_"))}
