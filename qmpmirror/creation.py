# SPDX-License-Identifier: MIT
"""Creation options as ``qemu-img create -o`` takes them, in the types of ``blockdev-create``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qmpmirror.errors import Refused, Unsupported, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.schema import Schema

ENCRYPT: Final = "encrypt."
_OURS: Final = frozenset(
    {"driver", "file", "size", "backing-file", "backing-fmt", "encrypt", "key-secret"}
)
_VERSIONS: Final[Mapping[str, str]] = {"0.10": "v2", "1.1": "v3"}
_SWITCHES: Final[Mapping[str, bool]] = {"on": True, "yes": True, "off": False, "no": False}
_SIZE: Final = re.compile(r"(\d+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS: Final = "kmgt"


def typed(schema: Schema, driver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the names and types that this QEMU wants.

    Args:
        schema: what this QEMU can do.
        driver: the format.
        options: names as of qemu-img (``cluster_size``) or QMP (``cluster-size``).

    Raises:
        Unsupported: this QEMU's driver has no such option.
        UsageError: a value that cannot be one of it.
    """
    known = {
        name: kind for name, kind in schema.creation_options(driver).items() if name not in _OURS
    }
    found: dict[str, Any] = {}
    for given, word in options.items():
        name, value = _qmp(given, word)
        if name not in known:
            raise Unsupported(
                f"format {driver} has no option {given!r}: this QEMU offers"
                f" {', '.join(sorted(known)) or 'none'}",
                command="blockdev-create",
                argument=name,
            )
        found[name] = _value(given, value, known[name])
    return found


def luks(schema: Schema, options: Mapping[str, Any], *, encrypted: bool) -> dict[str, Any]:
    """The options of LUKS inside of a qcow2 image, which qemu-img calls ``encrypt.*``.

    Raises:
        Refused: there are such options, and it is no encrypted qcow2 image.
        Unsupported: UsageError: as `typed`.
    """
    given = {
        name.removeprefix(ENCRYPT): value
        for name, value in options.items()
        if name.startswith(ENCRYPT)
    }
    if given and not encrypted:
        raise Refused(
            f"options {ENCRYPT}* are for an encrypted qcow2 image",
            hint="give --secret FILE; with --format luks they have no such prefix",
        )
    return typed(schema, "luks", given)


def _qmp(name: str, value: Any) -> tuple[str, Any]:
    if name == "compat":
        return "version", _VERSIONS.get(str(value), value)
    return name.replace("_", "-"), value


def _value(name: str, value: Any, kind: str) -> Any:
    if not isinstance(value, str):
        return value
    if kind == "boolean":
        if value not in _SWITCHES:
            raise UsageError(f"-o {name}={value}: give on or off")
        return _SWITCHES[value]
    if kind == "int":
        match = _SIZE.fullmatch(value)
        if match is None:
            raise UsageError(f"-o {name}={value}: give a number of bytes, or one with k, M, G")
        number, letter = match.groups()
        return int(number) * 1024 ** (_UNITS.index(letter.lower()) + 1 if letter else 0)
    return value
