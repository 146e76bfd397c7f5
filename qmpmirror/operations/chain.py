# SPDX-License-Identifier: MIT
"""The own backing chain of a prepared target, opened late: at the pivot.

Until then somebody may still be copying the base. ``blockdev-snapshot`` hangs the target over it,
which QEMU 5.0 and newer allow for a target that nobody reads from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpmirror import destination, errors, graph, names
from qmpmirror.destination import Kind
from qmpmirror.names import Flag
from qmpmirror.operations.check_base import compare
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName


async def attach_own_chain(monitor: Monitor, picture: Graph, name: JobName) -> Node:
    """Open the chain that the target's header names, and hang the target over it.

    It can be repeated: what an earlier try has done is not done again, and what failed is undone.

    Returns:
        The target, with its backing.

    Raises:
        DestinationError: the chain is not there, or cannot be the source's.
    """
    target = picture.nodes[names.node_name(name.run, "format")]
    if target.child("backing"):
        return target
    base = names.node_name(name.run, "base")
    if base not in picture.nodes:
        await _open(monitor, base, target)
    try:
        picture = await graph.read(monitor)
        _check_size(picture, base, name.source, target)
        if Flag.CHECK_BASE in name.flags:
            await compare(monitor, picture, name.source, base)
        await monitor.execute("blockdev-snapshot", {"node": base, "overlay": target.name})
    except BaseException:
        await attempt(monitor, Command("blockdev-del", {"node-name": base}))
        raise
    return (await graph.read(monitor)).nodes[target.name]


async def _open(monitor: Monitor, base: str, target: Node) -> None:
    if not target.backing_format:
        raise _refused(target, "does not say the format of its backing file")
    where = destination.parse(target.backing_filename)
    image: dict[str, Any] = dict(where.options)
    if where.kind is not Kind.IMAGE:
        image = {"driver": target.backing_format, "file": image}
    try:
        # What is below it has the same.
        cache = {"direct": target.cache_direct, "no-flush": target.cache_no_flush}
        options = {**image, "node-name": base, "read-only": True, "cache": cache}
        await monitor.execute("blockdev-add", options)
    except errors.CommandFailed as error:
        raise _refused(
            target, f"has a backing file that cannot be opened: {error.reason}"
        ) from error


def _check_size(picture: Graph, base: str, source: str, target: Node) -> None:
    wanted = picture.nodes[source].child("backing")
    have, need = picture.nodes[base].virtual_size, picture.nodes[wanted].virtual_size
    if have != need:
        raise _refused(
            target, f"has a backing file of {have} bytes, the disk one of {need}: not the same one"
        )


def _refused(target: Node, why: str) -> errors.DestinationError:
    return errors.DestinationError(f"the copy {target.filename} {why}", destination=target.filename)
