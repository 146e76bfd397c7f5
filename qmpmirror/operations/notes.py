# SPDX-License-Identifier: MIT
"""What the user of a copy must know before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.operations import bitmaps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.commandline import Given
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node


def misnamed(path: str, new_format: str) -> Iterator[str]:
    """A name that says another format: as with virsh, a copy has that of its source."""
    suffix = path.rpartition(".")[2]
    if suffix in {"qcow2", "raw", "vmdk", "vdi", "qed"} - {new_format}:
        yield f"{path} is {new_format}, whatever its name says: --format {suffix} would make it so"


def foreseen(
    picture: Graph, disk: Disk, source: Node, given: Given, new_format: str, *, shallow: bool
) -> Iterator[str]:
    """Bitmaps that the copy cannot keep, and what the filters above the disk do to it.

    A mirror reads through the filters: QEMU starts none below them.
    """
    yield from bitmaps.losses(source, new_format)
    filters = {picture.nodes[name].driver for name in picture.stack(disk.node)}
    on_read = given.copy_on_read or "copy-on-read" in filters
    # A shallow copy reads only what the top image has, and copies nothing up.
    if on_read and not shallow and source.child("backing"):
        yield (
            f"disk {disk.name} has copy-on-read, and the copy reads all of it: the source will"
            " grow by what its backing files hold"
        )
    if "throttle" in filters:
        yield (
            f"the copy reads through the throttle filter of disk {disk.name}: it uses up the"
            " guest's share"
        )
