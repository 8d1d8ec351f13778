"""The report of a profile as one HTML file that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from petl_kernels.profiling.plots import measured
from petl_kernels.profiling.tables import Rows, adapters_table, fuse_table, saved_table, step_table, summary_table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #bc4b51; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 48rem; } .soft { opacity: .75; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--line); } tbody tr:hover { background: var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.wrong { border-left: 4px solid var(--accent); padding: .3rem .8rem; }
code, pre { font-size: .85rem; } pre { overflow-x: auto; background: var(--soft); padding: .8rem; }
"""
PICTURES = {
    "step": "Horizontal bars: the parts of each variant's step",
    "saved": "Horizontal bars: bytes saved for the backward pass, by module and variant",
    "memory": "Lines: memory allocated during a step, by variant",
}


def page(record: dict[str, Any], pictures: Sequence[Path]) -> str:
    """The report.

    Args:
        record: of `petl_kernels.profiling.profile`.
        pictures: PNG files that go into it, by the names in `PICTURES`.
    """
    shown = {path.stem: _picture(path) for path in pictures}
    title = f"A training step of {record['target']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(facts(record))}</p>',
        *(f'<p class="wrong">{escape(line)}</p>' for line in record["wrong"]),
        *_section("Side by side", summary_table(record)),
        *_unavailable(record),
        *_section("Where the step goes", step_table(record), shown.get("step")),
        *_section("Saved activations by module, MiB", saved_table(record), shown.get("saved")),
        *([f"<h2>Memory over the step</h2>{shown['memory']}"] if "memory" in shown else []),
        *_section("What fuse changes, and what it leaves", fuse_table(record), text=True),
        *_section("Where the adapters are", adapters_table(record), text=True),
        *_files(record),
        "<details><summary>All figures, as JSON</summary>",
        f"<pre>{escape(json.dumps(_short(record), indent=1))}</pre></details>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    lines = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{lines}\n</body></html>\n"
    )


def facts(record: dict[str, Any]) -> str:
    """One line: the machine, the versions, the settings that are not the default."""
    machine, settings = record["machine"], record["settings"]
    said = [machine["device"], f"{machine['threads']} threads", f"torch {machine['torch']}"]
    said += [f"petl_kernels {machine['petl_kernels']}", machine["time"], f"{settings['steps']} steps of each"]
    said += [f"{name} {settings[name]}" for name in ("method", "batch", "dtype", "impl") if settings[name]]
    return ", ".join(said)


def table(rows: Rows, text: bool = False) -> str:
    """An HTML table; the first row is its head."""

    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    kind = ' class="text"' if text else ""
    lines = "\n".join(row(cells, "td") for cells in body)
    return f'<div class="wide"><table{kind}><thead>{row(head, "th")}</thead>\n<tbody>{lines}</tbody></table></div>'


def _section(title: str, rows: Rows, picture: str | None = None, text: bool = False) -> list[str]:
    if len(rows) < 2:
        return []
    return [f"<h2>{escape(title)}</h2>", *([picture] if picture else []), table(rows, text)]


def _unavailable(record: dict[str, Any]) -> list[str]:
    left = {name: v["unavailable"] for name, v in record["variants"].items() if name not in measured(record)}
    items = "".join(f"<li><b>{escape(name)}</b> did not run: {escape(str(why))}</li>" for name, why in left.items())
    return [f"<ul>{items}</ul>"] if left else []


def _files(record: dict[str, Any]) -> list[str]:
    items = [
        f"<li><code>{escape(variant[key])}</code>: {what}</li>"
        for variant in measured(record).values()
        for key, what in (
            ("trace", "open it at ui.perfetto.dev"),
            ("snapshot", "the allocator's history, open it at pytorch.org/memory_viz"),
        )
        if variant[key]
    ]
    return ["<h2>Files beside this one</h2>", f"<ul>{''.join(items)}</ul>"] if items else []


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(PICTURES[path.stem])}" src="data:image/png;base64,{data}">'


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """Without the courses of memory, thousands of numbers that the plot shows."""
    variants = {n: {k: v for k, v in each.items() if k != "memory"} for n, each in record["variants"].items()}
    return {**record, "variants": variants}
