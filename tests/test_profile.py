"""`petl-kernels profile`: what it measures against what can be known, its files, its refusals."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import profiled
import pytest
import torch
from typer.testing import CliRunner

from petl_kernels.cli import app
from petl_kernels.methods import METHODS
from petl_kernels.profiling import count_launches, saved_by_module, saved_bytes, step, target, variants
from petl_kernels.profiling.measures import intercept
from petl_kernels.profiling.sites import find_sites
from petl_kernels.profiling.tables import summary_table
from petl_kernels.profiling.target import Feed, Options, TargetError, find_target
from petl_kernels.profiling.variants import make

SCRIPT = str(Path(profiled.__file__))


def cli(*args):
    return CliRunner().invoke(app, ["profile", *args], env={"COLUMNS": "160"})


def found(function, **options):
    return find_target(f"{SCRIPT}:{function}", Options(**options))


def eager_of(function):
    return make("eager", found(function), None, None, ())


@pytest.fixture(scope="module")
def profiled_once(tmp_path_factory):
    """One run with every variant and file; compiled by a backend that needs no compiler."""
    out = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        result = cli(SCRIPT, "--steps", "1", "--variants", ",".join(variants.VARIANTS), "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out


def test_the_record(profiled_once):
    record, out = profiled_once
    assert record == json.loads((out / "profile.json").read_text())
    runs = record["variants"]
    assert list(runs) == list(variants.VARIANTS) and record["wrong"] == []
    for name, run in runs.items():
        assert run["step_ms"] > 0 and run["low_ms"] <= run["step_ms"] <= run["high_ms"]
        assert set(run["parts_ms"]) == set(step.PARTS) and run["peak_mib"] >= run["saved_mib"] / 2 > 0
        assert run["above_frozen_ms"] == run["step_ms"] - runs["frozen"]["step_ms"]
        assert (run["adapters_ms"] is None) == (name == "frozen" or name.endswith("compiled"))
        if run["saved_by_module"] is not None:
            assert sum(run["saved_by_module"].values()) == pytest.approx(run["saved_mib"])
        if name not in ("frozen", "eager"):
            assert 0 < run["difference"]["gradients"] < 1e-5 or name == "compiled"
    assert runs["frozen"]["trained"] == 0 < runs["eager"]["trained"] == runs["fused"]["trained"]
    assert runs["frozen"]["saved_mib"] < runs["fused"]["saved_mib"] < runs["eager"]["saved_mib"]
    assert runs["frozen"]["operators"] < runs["fused"]["operators"] < runs["eager"]["operators"]
    assert sum(runs["fused"]["package_operators"].values()) == 8 and not runs["eager"]["package_operators"]
    assert len(record["adapters"]) == len(record["fuse"]["fused"]) == 4


def test_the_traces(profiled_once):
    record, out = profiled_once
    for run in record["variants"].values():
        events = json.loads(gzip.decompress((out / run["trace"]).read_bytes()))["traceEvents"]
        assert {"data", "forward", "backward", "optimizer"} <= {event.get("name") for event in events}
    fused = json.loads(gzip.decompress((out / "trace-fused.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "adapter blocks.1.after_ffn" for event in fused) == 1


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.resources, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.resources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object", "embed")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_report_needs_nothing_else(profiled_once):
    record, out = profiled_once
    text = (out / "report.html").read_text()
    parsed = Page(text)
    assert not parsed.open and "@import" not in text and "url(" not in text
    assert len(parsed.resources) == 3 and all(r.startswith("data:image/png;base64,") for r in parsed.resources)
    wanted = [cell for row in summary_table(record) for cell in row if cell]
    assert f"{record['variants']['fused']['step_ms']:,.2f}" in wanted and set(wanted) <= set(parsed.cells)
    assert "blocks.*.after_ffn" in parsed.cells
    for name in ("step", "saved", "memory"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_browser_renders_the_report(profiled_once, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    from matplotlib import image

    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--force-color-profile=srgb", "--window-size=1000,1600"]
    command += [f"--screenshot={shot}", (profiled_once[1] / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1600, 1000)
    # The bars of the picture are there, in their colours, and text above them.
    for colour in ((0x9D, 0xB4, 0xC0), (0xBC, 0x4B, 0x51)):
        assert (abs(pixels - colour).max(-1) <= 2).sum() > 500
    assert (pixels[:200].max(-1) < 100).sum() > 200


def test_the_tables_in_a_terminal(tmp_path):
    result = cli(SCRIPT, "--quick", "--out", str(tmp_path), "--no-plots", "--variants", "eager,fused")
    assert result.exit_code == 0, result.output
    for text in ("speed of eager's step", "adapters forward", "blocks.*.after_ffn", "sequential, 32 -> 8 -> 32, gelu"):
        assert text in result.stdout
    assert "above the frozen step" not in result.stdout and not list(tmp_path.glob("*.png"))
    assert "timing" not in result.stderr  # no progress bar where there is no terminal


@pytest.mark.parametrize("name", ["bert-base", "vit-b16"])
def test_built_in_models(name, monkeypatch, tmp_path):
    small = {"bert-base": profiled.small_bert, "vit-b16": profiled.small_vit}[name]
    monkeypatch.setitem(target.BUILT_IN, name, small)
    args = ("--method", "lora", "--option", "rank=4", "--quick", "--dtype", "bfloat16", "--no-plots", "--json")
    result = cli(name, *args, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["variants"]["compiled"]["unavailable"].startswith("--quick")
    assert record["variants"]["eager"]["trained"] == 2 * 2 * 4 * 64 + 32 * 3 + 3  # two blocks, two linears, the head
    assert {site["class"] for site in record["adapters"].values()} == {"LoRALinear"}


def wrong_fuse(model, impl=None):
    from petl_kernels import fuse

    with torch.no_grad():
        model.blocks[1].after_ffn.up.bias[0] += 0.5
    return fuse(model, impl=impl)


def test_what_computes_something_else_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "fuse", wrong_fuse)
    result = cli(SCRIPT, "--steps", "1", "--out", str(tmp_path), "--no-plots", "--json", "--variants", "fused")
    assert result.exit_code == 1 and "fused: its gradients differ from eager's" in result.stderr
    record = json.loads(result.stdout)
    assert list(record["variants"]["fused"]) == ["unavailable"] and len(record["wrong"]) == 1
    assert "fused: its gradients differ" in (tmp_path / "report.html").read_text()


def test_a_variant_that_cannot_run_is_listed(monkeypatch, tmp_path):
    def no_compiler(model):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", lambda model: no_compiler)
    result = cli(SCRIPT, "--steps", "1", "--variants", "eager,compiled", "--out", str(tmp_path), "--no-plots")
    assert result.exit_code == 0 and "compiled did not run: RuntimeError: no C++ compiler was found" in result.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["resnet"], "'resnet' is no built-in model"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["no_such_module:build"], "importing 'no_such_module' failed with ModuleNotFoundError"),
        ([f"{SCRIPT}:bild"], "has no function 'bild'; it has small_bert"),
        ([f"{SCRIPT}:LIST"], "has no function 'LIST'"),
        ([f"{SCRIPT}:broken"], "failed with RuntimeError: no such checkpoint"),
        ([f"{SCRIPT}:two"], "it returned a tuple of 2"),
        ([f"{SCRIPT}:no_model"], "its model has to be an nn.Module, and is of type NoneType"),
        ([f"{SCRIPT}:no_loss"], "its loss has to be a function of (model, batch), and is 3"),
        ([f"{SCRIPT}:nothing_trains"], "no parameter of its model trains"),
        ([f"{SCRIPT}:vector"], "returned a tensor of shape [4, 3]"),
        ([f"{SCRIPT}:broken_step"], "its step failed with"),
        ([SCRIPT, "--adapters", "layer.*"], "'layer.*' matches nothing"),
        ([SCRIPT, "--method", "lora"], "--method is for the built-in models"),
        (["bert-base", "--method", "loro"], "--method has to be one of houlsby"),
        (["bert-base", "--option", "rank"], "--option has to be name=value"),
        (["bert-base", "--option", "rank=4", "--quick"], "unexpected keyword argument 'rank'"),
        ([SCRIPT, "--variants", "eager,fast"], "fast is none of frozen"),
        ([SCRIPT, "--dtype", "int8"], "--dtype has to be one of"),
        ([SCRIPT, "--impl", "fast"], "--impl has to be one of"),
    ],
)
def test_what_is_refused(args, words, monkeypatch, tmp_path):
    monkeypatch.setitem(target.BUILT_IN, "bert-base", profiled.small_bert)
    result = cli(*args, "--out", str(tmp_path), "--no-plots")
    assert result.exit_code == 2 and words in result.stderr and result.stdout == "", result.output


def test_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli(SCRIPT, "--device", "cuda", "--out", str(tmp_path))
    assert result.exit_code == 3 and "no CUDA device" in result.stderr
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = cli(SCRIPT, "--out", str(tmp_path))
    assert result.exit_code == 3 and "pip install 'petl-kernels[profile]'" in result.stderr


def gradients_reach(variant):
    """Which modules of a frozen model see a gradient."""
    seen = set()

    def watch(name, module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.add(name))

    for name, module in variant.parts.model.named_modules():
        module.register_forward_hook(partial(watch, name))
    variant.step()
    return seen


def test_the_frozen_step_goes_back_to_the_first_adapter_and_no_further():
    eager = eager_of("build")
    frozen = make("frozen", found("build"), eager, None, ())
    bare = make("frozen", found("by_hand"), eager, None, ())  # built by adapters=False
    inputs = eager.parts.feed.next()
    assert torch.equal(frozen.parts.model(inputs[0]), bare.parts.model(inputs[0]))
    for variant in (frozen, bare):
        seen = gradients_reach(variant)
        assert "blocks.0.attention.output" not in seen and "words" not in seen
        assert {"blocks.0.after_attention", "blocks.0", "blocks.1.attention.query"} <= seen


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_found_and_taken_out(method, monkeypatch):
    name = "vit-b16"
    monkeypatch.setitem(target.BUILT_IN, name, profiled.small_vit)
    settings = {"k": 8} if method == "sct" else {}
    goal = find_target(name, Options(method=method, settings=settings, batch=2))
    eager = make("eager", goal, None, None, ())
    frozen = make("frozen", goal, eager, None, ())
    assert frozen.unavailable is None and bool(eager.sites) == (method != "layer_norm")
    plain = profiled.small_vit()
    plain.load_state_dict(eager.parts.model.state_dict(), strict=False)
    assert [n for n, _ in frozen.parts.model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert count_launches(frozen.step).total() < count_launches(eager.step).total()


@pytest.mark.parametrize("library, kind", [("adapters_library", "adapters"), ("peft_library", "peft")])
def test_adapters_of_libraries_are_found_and_taken_out(library, kind):
    pytest.importorskip(kind)
    goal = found(library)
    eager = make("eager", goal, None, None, ())
    assert len(eager.sites) == 4 and {site.kind for site in eager.sites} == {kind}
    frozen = make("frozen", goal, eager, None, ())
    used = []
    for name, module in frozen.parts.model.named_modules():
        if "lora_" in name or "adapter_down" in name:
            module.register_forward_hook(lambda *args, name=name: used.append(name))
    frozen.step()
    assert not used and frozen.trained == []
    batch = eager.parts.feed.next()
    fused = make("fused", goal, eager, "cpp" if kind == "adapters" else None, ())
    assert variants.compare(fused, variants.reference(eager, batch), batch) is None and len(fused.fuse.fused) == 4
    measured = step.time_steps([fused], "cpu", 1, lambda: None)["fused"]
    assert 0 < measured.adapters_ms["forward"] < measured.parts_ms["forward"]


def test_unknown_adapters_have_to_be_named():
    eager = eager_of("unknown")
    assert eager.sites == []
    assert "--adapters" in make("frozen", found("unknown"), eager, None, ()).unavailable
    named = make("eager", found("unknown"), None, None, ["blocks.*.after_ffn"])
    assert [site.name for site in named.sites] == ["blocks.0.after_ffn", "blocks.1.after_ffn"]
    assert "adapters=False" in make("frozen", found("unknown"), named, None, ["blocks.1.after_ffn"]).unavailable


def test_batches():
    feed = found("loaded").build().feed
    assert torch.equal(feed.next()[1], torch.tensor([0, 1])) and torch.equal(feed.next()[1], torch.tensor([2, 0]))
    assert torch.equal(feed.next()[1], torch.tensor([0, 1]))  # from the start again
    drained = found("drained").build().feed
    drained.next(), drained.next()
    with pytest.raises(TargetError, match="ends and cannot be iterated again"):
        drained.next()
    batch = {"x": torch.ones(2)}
    assert Feed(batch, "cpu").next()["x"] is batch["x"] and Feed(None, "cpu").next() is None


def test_saved_activations_by_module_are_those_of_the_whole():
    variant = eager_of("build")
    batch, model = variant.parts.feed.next(), variant.parts.model
    by_module = saved_by_module(lambda: variant.loss(batch), model)
    assert by_module.total() == saved_bytes(lambda: variant.loss(batch), exclude=model.parameters())
    rows = 4 * profiled.SIZE.tokens
    # Of an adapter: what GELU and the up-projection read, z and h; x is what the sub-layer's linear gave.
    assert by_module["blocks.0.after_ffn"] + by_module["blocks.0.after_ffn.up"] == 2 * rows * 8 * 4
    assert by_module["blocks.0.after_ffn.down"] == rows * 32 * 4 and by_module[""] > 0


def test_watching_fused_modules_leaves_them_fused():
    fused = make("fused", found("build"), eager_of("build"), "cpp", ())
    assert [site.kind for site in find_sites(fused.parts.model)] == ["hand-written"] * 4
    fused.step()  # AdamW makes its state
    calls, before = [], count_launches(fused.step)

    def run(module, original, *args):
        calls.append(type(module).__name__)
        return original(*args)

    classes = [type(site.module) for site in fused.sites]
    with intercept([(site.module, site.method) for site in fused.sites], run):
        assert count_launches(fused.step) == before
    assert calls == ["FusedAdapter"] * 4 and [type(site.module) for site in fused.sites] == classes


def test_peak_memory_is_that_of_the_allocations(tmp_path):
    variant = eager_of("build")
    variant.step()
    original = variant.parts.loss

    def with_buffers(model, batch):
        for _ in range(3):
            torch.empty(32 * 2**20, dtype=torch.uint8)  # freed at once: one at a time
        return original(model, batch)

    def peak():
        measured = step.time_steps([variant], "cpu", 1, lambda: None)["eager"]
        step.trace(variant, measured, "cpu", tmp_path / "trace.json.gz")
        return measured.peak_mib

    assert peak() < 16
    variant.parts.loss = with_buffers
    assert 32 <= peak() < 33
