"""The table of mutations in tests/README.md."""

from __future__ import annotations

from . import tables

README = tables.ROOT / "tests" / "README.md"
BEGIN, END = "<!-- mutations: written by `make mutations` -->\n", "<!-- /mutations -->\n"


def table() -> str:
    """One row per mutation, from the results."""
    rows = [("kernel", "mutation", "caught by"), ("---", "---", "---")]
    entries = [entry for found in tables.results().values() for entry in found.values()]
    for kernel, found in tables.results().items():
        for i, (name, entry) in enumerate(found.items()):
            caught = f"`{entry['caught_by']}`" if entry["caught_by"] else "**nothing**"
            rows.append(("" if i else kernel, name, caught.replace("|", "\\|")))
    of_all = sum(len(kernel.mutations) for kernel in tables.kernels())
    caught, minutes = sum(bool(e["caught_by"]) for e in entries), sum(e["seconds"] for e in entries) / 60
    summary = f"{of_all} mutations, {len(entries)} of them tried: {caught} caught, in {minutes:.0f} minutes.\n"
    return "\n".join([summary, *(f"| {' | '.join(row)} |" for row in rows), ""])


def write() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
