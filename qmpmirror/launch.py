# SPDX-License-Identifier: MIT
"""What to write on QEMU's next command line, since nobody rewrites it for its user."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Node

_NAMED_BY_QEMU: Final = re.compile(
    r"(?:(?P<paired>ide|scsi)(?P<bus>\d+)-(?P<media>hd|cd)(?P<unit>\d+)"
    r"|(?P<interface>floppy|mtd|pflash|sd|virtio|xen)(?P<index>\d+))"
)
"""What QEMU calls a ``-drive`` without an id: it says where the drive is connected."""


def options(disk: Disk, destination: str, new_format: str) -> list[str]:
    """The words that open the copy in the place of the disk's old image.

    A disk of ``-drive`` gets a ``-drive`` with the same place or the same id, one of ``-blockdev``
    a ``-blockdev`` with the same node name, so that the rest of the command line stays as it was.
    An image that is described inside of its filter's ``-blockdev`` has no name: it gets none here.

    What QEMU does not tell is not in these words, such as ``aio`` or ``serial``.
    """
    if disk.drive:
        words = [f"file={destination.replace(',', ',,')}", f"format={new_format}"]
        words += _place(disk)
        if disk.image is not None:
            words += [f"{key}={value}" for key, value in _drive_options(disk.image).items()]
        return ["-drive", ",".join(words)]
    node: dict[str, Any] = {"driver": new_format}
    if disk.image is not None and disk.image.named_by_user:
        node["node-name"] = disk.image.name
    node["file"] = {"driver": "file", "filename": destination}
    return ["-blockdev", json.dumps(node | _node_options(disk.image))]


def _place(disk: Disk) -> list[str]:
    """How the drive is connected to the guest."""
    found = _NAMED_BY_QEMU.fullmatch(disk.drive)
    media = ["media=cdrom"] if disk.removable and not disk.target.startswith("fd") else []
    if found is not None and not disk.device:
        if found["index"]:
            return [f"if={found['interface']}", f"index={found['index']}"]
        place = [f"if={found['paired']}", f"bus={found['bus']}", f"unit={found['unit']}"]
        return place + media
    if not disk.qom_path.startswith("/machine/unattached/"):
        return ["if=none", f"id={disk.drive}"]
    # A drive that the board itself connects; if= may be left to the machine's default.
    floppy = ["if=floppy"] if disk.target.startswith("fd") else []
    return [*floppy, f"id={disk.drive}", *media]


def _drive_options(image: Node) -> dict[str, str]:
    found = {
        "cache.direct": "on" if image.cache_direct else "",
        "cache.no-flush": "on" if image.cache_no_flush else "",
        "read-only": "on" if image.read_only else "",
    }
    return {key: value for key, value in found.items() if value} | _zero_options(image)


def _node_options(image: Node | None) -> dict[str, Any]:
    if image is None:
        return {}
    found: dict[str, Any] = {}
    if image.cache_direct or image.cache_no_flush:
        found["cache"] = {"direct": image.cache_direct, "no-flush": image.cache_no_flush}
    if image.read_only:
        found["read-only"] = True
    return found | _zero_options(image)


def _zero_options(image: Node) -> dict[str, str]:
    if image.detect_zeroes == "unmap":
        # QEMU takes it only together with this.
        return {"discard": "unmap", "detect-zeroes": "unmap"}
    return {"detect-zeroes": "on"} if image.detect_zeroes == "on" else {}
