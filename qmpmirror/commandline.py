# SPDX-License-Identifier: MIT
"""What QEMU's command line says of an image and QMP does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ON: Final = frozenset({"on", "yes", "true", "y"})


@attrs.frozen
class Given:
    """What was given for an image when QEMU was started.

    Attributes:
        aio: ``threads``, ``native`` or ``io_uring``; empty when nothing was said, or when QEMU
            cannot be looked at, or has opened the image later.
        copy_on_read: whether its ``-drive`` has copy-on-read, which no node shows.
    """

    aio: str = ""
    copy_on_read: bool = False


def given(pid: int | None, path: str) -> Given:
    """What the command line of a QEMU of this host says of an image.

    Args:
        pid: the process; None when it is not known.
        path: the image, absolute.
    """
    folder = discover.working_folder(pid)
    if folder is None or not os.path.isabs(path):
        return Given()
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return Given()
    for option, value in discover.options(text.split("\0")[1:-1]):
        if option in {"drive", "blockdev"}:
            found = _of_image(_flat(value), path, folder)
            if found is not None:
                return found
    return Given()


def _of_image(options: Mapping[str, str], path: str, folder: str) -> Given | None:
    for key, value in options.items():
        if key != "file" and key.rpartition(".")[2] != "filename":
            continue
        named = os.path.join(folder, value.removeprefix("file:"))
        if os.path.realpath(named) == os.path.realpath(path):
            nested = options.get(key.removesuffix("filename") + "aio", "")
            on_read = options.get("copy-on-read", "") in _ON
            return Given(nested or options.get("aio", ""), on_read)
    return None


def _flat(value: str) -> dict[str, str]:
    """The options of a ``-drive`` or ``-blockdev`` with dotted keys."""
    if not value.startswith("{"):
        return discover.suboptions(value, implied="driver")
    try:
        return dict(_leaves(json.loads(value), ""))
    except ValueError:
        return {}


def _leaves(options: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
