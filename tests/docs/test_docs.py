# SPDX-License-Identifier: MIT
"""Every command and every program of the documentation is run."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.blocks import Block, Sandbox, _compare, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
RUNNABLE = [page for page in PAGES if [*blocks(page.read_text())]]


@pytest.fixture
def sandbox(qemu_binary: str) -> Iterator[Sandbox]:
    folder = Path(tempfile.mkdtemp(prefix="docs-", dir="/tmp"))
    made = Sandbox(folder, qemu_binary, f"docs-{os.urandom(4).hex()}")
    made.prepare()
    yield made
    made.end()
    shutil.rmtree(folder)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, sandbox: Sandbox) -> None:
    for block in blocks(page.read_text()):
        try:
            sandbox.run(block)
        except BaseException as error:
            error.args = (f"{page.relative_to(ROOT)}:{block.line}: {error}",)
            raise


def test_the_important_pages_have_something_to_run() -> None:
    names = {str(page.relative_to(ROOT)) for page in RUNNABLE}
    assert {"README.md", "docs/tutorial/move-a-disk.md", "docs/howto/ci.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_skipped_says_why(page: Path) -> None:
    for how in re.findall(r"<!-- test: (skip.*?) -->", page.read_text()):
        assert re.fullmatch(r"skip: \w.{5,}", how)


def test_a_block_that_says_something_else_fails(sandbox: Sandbox) -> None:
    sandbox.run(Block("console", "$ echo /vm/a 17; echo b\n/vm/a 4\n...\n", "", 1))
    for text in ("$ echo a\nb\n", "$ echo a\n", "$ false\n", "$ true\nsomething\n"):
        with pytest.raises(AssertionError):
            sandbox.run(Block("console", text, "", 1))
    sandbox.run(Block("console", "$ true\n$ exit 3\n", "exit 3", 1))
    with pytest.raises(AssertionError):
        sandbox.run(Block("python", "raise SystemExit(1)\n", "", 1))


def test_what_is_printed_is_compared() -> None:
    _compare("x", "Block Copy: [ 1 %]\nDone in 3.5 s\nmore\nlast", "Done in 9 s\n...\nlast\n")
    with pytest.raises(AssertionError):
        _compare("x", "Done in 3.5 s", "Done within 9 s")
