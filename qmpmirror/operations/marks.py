# SPDX-License-Identifier: MIT
"""The bitmaps by which a later process learns what was under way (`names.Mark`), as commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror import names
from qmpmirror.steps import Command

if TYPE_CHECKING:
    from qmpmirror.names import Mark


def add(node: str, run: str, mark: Mark) -> Command:
    """Put a run's mark on a node."""
    return Command("block-dirty-bitmap-add", _bitmap(node, run, mark))


def remove(node: str, run: str, mark: Mark) -> Command:
    """Take it off again."""
    return Command("block-dirty-bitmap-remove", _bitmap(node, run, mark))


def _bitmap(node: str, run: str, mark: Mark) -> dict[str, str]:
    return {"node": node, "name": names.bitmap_name(run, mark)}
