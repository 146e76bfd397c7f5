# SPDX-License-Identifier: MIT
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qmpmirror


def test_the_list_is_sorted_and_each_name_is_there_once() -> None:
    assert qmpmirror.__all__ == sorted(set(qmpmirror.__all__))


@pytest.mark.parametrize("name", qmpmirror.__all__)
def test_every_name_is_found(name: str) -> None:
    found = getattr(qmpmirror, name)
    assert found.__name__ == name
    assert found.__module__.startswith("qmpmirror.")


@pytest.mark.parametrize("name", qmpmirror.__all__)
def test_every_name_is_documented(name: str) -> None:
    assert getattr(qmpmirror, name).__doc__


def test_type_checkers_see_the_same_names() -> None:
    """They read the imports that are never executed."""
    tree = ast.parse(Path(qmpmirror.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(homes) == qmpmirror.__all__
    for name, module in homes.items():
        assert getattr(sys.modules[str(module)], name) is getattr(qmpmirror, name)


def test_dir_lists_the_names() -> None:
    listed = dir(qmpmirror)
    assert listed == sorted(listed)
    assert {*qmpmirror.__all__, "__version__", "__all__"} <= set(listed)


@pytest.mark.parametrize("name", ["nonsense", "errors_", "_Home", "blockcopy"])
def test_other_names_are_not_there(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'qmpmirror' has no attribute '{name}'$"):
        getattr(qmpmirror, name)


def test_a_star_import_brings_these_names_only() -> None:
    space: dict[str, object] = {}
    exec("from qmpmirror import *", space)  # noqa: S102 - a star import needs a module's level
    assert sorted(set(space) - {"__builtins__"}) == qmpmirror.__all__


def test_the_package_alone_loads_nothing_else() -> None:
    code = "import qmpmirror, sys; print({'asyncio', 'attrs', 'qemu', 'argparse'} & {*sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "set()"
