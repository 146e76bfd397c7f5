# SPDX-License-Identifier: MIT
"""The public names, pinned: what is in the list is promised to users.

After a deliberate change: ``python tests/unit/test_interface.py`` writes the list anew, and the
changelog says what has changed.
"""

from __future__ import annotations

import enum
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import qmpmirror
import qmpmirror.testing
from qmpmirror.cli.manual import commands

if TYPE_CHECKING:
    from collections.abc import Iterator

PINNED = Path(__file__).with_name("data") / "interface.txt"


def members(cls: type) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield from cls.__members__
    fields = attrs.fields_dict(cls) if attrs.has(cls) else {}
    names = {*fields, *(name for name, _ in inspect.getmembers(cls))}
    inherited = set(dir(Exception)) if issubclass(cls, Exception) else set()
    yield from sorted(name for name in names - inherited if not name.startswith("_"))


def interface() -> Iterator[str]:
    """All that is promised, a line each."""
    spaces: tuple[Any, ...] = (qmpmirror, qmpmirror.testing)
    for space in spaces:
        for name in space.__all__:
            yield f"{space.__name__}.{name}"
            value = getattr(space, name)
            if isinstance(value, type):
                known = dict.fromkeys(members(value))
                yield from (f"{space.__name__}.{name}.{member}" for member in known)
    for command in commands():
        yield f"$ qmpmirror {command.name} {' '.join(command.named)}".rstrip()
        for option in command.options:
            yield f"$ qmpmirror {command.name} {' '.join(option.flags)} {option.value}".rstrip()


def test_nothing_public_has_changed_by_accident() -> None:
    assert [*interface()] == PINNED.read_text().splitlines(), __doc__


if __name__ == "__main__":
    PINNED.write_text("\n".join(interface()) + "\n")
