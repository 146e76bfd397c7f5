# SPDX-License-Identifier: MIT
"""What QEMU's command line says of an image and QMP does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover
from qmpmirror.graph import FILTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qmpmirror.disks import Disk

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


@attrs.frozen
class Words:
    """How a disk's image was opened when QEMU was started.

    Attributes:
        name: the node name of the image; empty when it has none.
        options: the options of its ``-drive``, or of its node, with dotted keys.
        storage: those of its protocol node, when that is described apart or inside.
    """

    name: str = ""
    options: Mapping[str, str] = attrs.field(factory=dict)
    storage: Mapping[str, str] = attrs.field(factory=dict)


def words(pid: int | None, disk: Disk) -> Words:
    """What the command line of a QEMU of this host says of a disk, whatever it runs on by now."""
    found = _read(pid)
    if disk.drive:
        drives = [_flat(value) for option, value in found if option == "drive"]
        return Words(options=next((d for d in drives if d.get("id") == disk.drive), {}))
    nodes = [_flat(value) for option, value in found if option == "blockdev"]
    named = {node["node-name"]: node for node in nodes if "node-name" in node}
    devices = [_flat(value) for option, value in found if option == "device"]
    name = next((d.get("drive", "") for d in devices if disk.device == d.get("id", "?")), "")
    while name in named and named[name].get("driver") in FILTERS:
        name = named[name].get("file", "")
    image = named.get(name, {})
    storage = named.get(image.get("file", ""), {})
    inside = {k.removeprefix("file."): v for k, v in image.items() if k.startswith("file.")}
    # A node of its own may have that name still.
    apart = {key: value for key, value in storage.items() if key != "node-name"}
    return Words(name, image, inside or apart)


def _read(pid: int | None) -> Sequence[tuple[str, str]]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return ()
    return [*discover.options(text.split("\0")[1:-1])]


def given(pid: int | None, path: str) -> Given:
    """What the command line of a QEMU of this host says of an image.

    Args:
        pid: the process; None when it is not known.
        path: the image, absolute.
    """
    folder = discover.working_folder(pid)
    if folder is None or not os.path.isabs(path):
        return Given()
    for option, value in _read(pid):
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
