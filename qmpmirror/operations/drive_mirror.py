# SPDX-License-Identifier: MIT
"""What a copy by ``drive-mirror`` cannot do: it opens and creates its target by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror import errors
from qmpmirror.destination import Kind

if TYPE_CHECKING:
    from qmpmirror.destination import Destination
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.target import Wish


def check(
    picture: Graph, disk: Disk, where: Destination, wish: Wish, *, synchronous: bool, shallow: bool
) -> None:
    """Refuse what only blockdev-mirror can do.

    Args:
        picture: the block graph.
        disk: the source.
        where: the destination.
        wish: what the target shall be.
        synchronous: whether guest writes are going to wait for the target.
        shallow: whether the copy shares a backing chain.

    Raises:
        Refused: it would corrupt or lose the copy, or cannot make it.
    """
    if synchronous and shallow:
        # Its target is opened without the backing file: guest writes smaller than a cluster would
        # hide the base's data.
        raise errors.Refused(
            "synchronous writes with a shallow drive-mirror would corrupt the copy",
            hint="use blockdev-mirror",
        )
    if where.kind is not Kind.FILE or wish.reuse or wish.options or wish.secret:
        raise errors.Refused(
            "drive-mirror takes a new file only, and no options for it",
            hint="use blockdev-mirror",
        )
    if not disk.qom_path and not picture.is_used(disk.node):
        # The target of a drive-mirror is the job's alone: after a pivot nobody would hold it.
        raise errors.Refused(
            f"drive-mirror of node {disk.node}, which nothing uses, would lose the copy in a pivot",
            hint="use blockdev-mirror",
        )
