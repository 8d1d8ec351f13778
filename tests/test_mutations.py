"""The mutations: their tables fit the sources, every kernel has enough of them, and what was tried was caught."""

from __future__ import annotations

import pytest

pytest.importorskip("tomllib")  # Python 3.11

from mutations import readme, tables

KERNELS = tables.kernels()


def test_every_kernel_has_a_table():
    assert {kernel.name for kernel in KERNELS} == tables.of_the_package()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_is_replaced_stands_once_in_its_file(kernel):
    for mutation in kernel.mutations:
        mutation.mutated((tables.ROOT / mutation.file).read_text())
    assert len({m.digest for m in kernel.mutations}) == len({m.name for m in kernel.mutations}) >= tables.LEAST


def test_nothing_that_was_tried_went_unnoticed():
    now = {(kernel.name, m.name): m.digest for kernel in KERNELS for m in kernel.mutations}
    for kernel, found in tables.results().items():
        for name, entry in found.items():
            assert entry["caught_by"] and entry["mutation"] == now[kernel, name], (kernel, name)


def test_the_readme_has_the_results():
    assert readme.BEGIN + readme.table() + readme.END in readme.README.read_text()
