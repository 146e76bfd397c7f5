# SPDX-License-Identifier: MIT
"""The end of a copy: what has really happened, and what is to be put away.

A finish and a pivot give the same events, and a failed job may have switched the guest: only the
graph tells. The job is dismissed last: until then it is QEMU's record of what belongs to the run,
and another process could do the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover, disks, errors, graph, launch, names, sizes
from qmpmirror.life import Active, Ending, Life, Phase
from qmpmirror.names import Flag
from qmpmirror.steps import Command, attempt, remove_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName
    from qmpmirror.operations.copy import Copy
    from qmpmirror.sizes import ImageSize


@attrs.frozen
class Result:
    """How a copy has ended, read back from QEMU.

    Attributes:
        outcome: ``PIVOTED``, ``FINISHED`` or ``ABORTED``.
        disk: the disk's name.
        source: where the source image is.
        destination: where the copy is.
        active: the image that the guest uses now.
        consistent: whether the destination holds a whole copy (after a pivot: is the disk).
        removed: whether the destination's file was removed, because the copy was not whole.
        left: what could not be cleaned up, one entry each.
        notes: what the user must know, one sentence each.
        source_size: of the images that were copied: the top one if shallow, else with all below it.
        destination_size: of the copy. Both are None when that is not known any more.
        launch: after a pivot, the words that open the copy at QEMU's next start (`launch`).
    """

    outcome: Phase
    disk: str
    source: str
    destination: str
    active: str
    consistent: bool
    removed: bool = False
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_size: ImageSize | None = None
    destination_size: ImageSize | None = None
    launch: tuple[str, ...] = ()


async def conclude(copy: Copy) -> Result:
    """Put an ended job away and say how it has ended.

    Raises:
        JobFailed: it failed.
    """
    monitor, life = copy.monitor, copy.job.life
    ended = await copy.job.refresh()
    error = ended.error if ended else copy.job.error
    copy.job.close()
    picture = await graph.read(monitor)
    active, where = await _authoritative(copy, picture, error)
    outcome = life.conclude(error, active)
    consistent = _is_consistent(life)
    words: tuple[str, ...] = ()
    if outcome is Phase.PIVOTED:
        opened = await launch.read(monitor, picture, copy.name.run)
        words = tuple(launch.options(copy.disk, where, copy.format, opened))
        await _remove_marks(copy, picture)
        left = await _let_go_of_source(copy, picture)
        removed = False
    else:
        left = await _delete(monitor, picture, _target_nodes(copy))
        await _delete_objects(monitor, copy.name.run, copy.name.flags)
        removed = not consistent and not left and _remove_worthless_file(copy, picture, active)
    await copy.job.dismiss()
    if outcome is Phase.FAILED:
        raise _failure(copy, error, active, where, left)
    return Result(
        outcome=outcome,
        disk=copy.disk.name,
        source=copy.disk.path,
        destination=copy.destination,
        active=where,
        consistent=consistent,
        removed=removed,
        left=tuple(left),
        notes=tuple(copy.notes),
        source_size=source_size(picture, copy.name) or copy.source_size,
        destination_size=None if removed else sizes.of_image(picture, copy.target_node),
        launch=words,
    )


def source_size(picture: Graph, name: JobName) -> ImageSize | None:
    """The size of what a copy copies, as long as its nodes are there."""
    of = sizes.of_image if Flag.SHALLOW in name.flags else sizes.of_chain
    return of(picture, name.source)


async def _authoritative(copy: Copy, picture: Graph, error: str) -> tuple[Active, str]:
    """The image that the guest uses, whatever was meant."""
    folder = discover.working_folder(copy.monitor.pid)
    source, target = copy.name.source, copy.target_node
    if copy.disk.qom_path:
        for disk in await disks.read(copy.monitor, picture, folder):
            if disk.is_under(copy.disk) and disk.image is not None:
                known = {source: Active.SOURCE, target: Active.TARGET}
                return known.get(disk.image.name, Active.OTHER), disk.path
        return Active.OTHER, ""
    # A node without a device: what used the source, such as an export, moves with a pivot.
    if any(user.kind == "block-backend" for user in picture.users.get(target, ())):
        return Active.TARGET, copy.destination
    life = copy.job.life
    unused = not any(user.kind == "block-backend" for user in picture.users.get(source, ()))
    if unused and life.asked is Ending.PIVOT and not error and not life.cancelled:
        return Active.TARGET, copy.destination
    return Active.SOURCE, copy.disk.path


def _is_consistent(life: Life) -> bool:
    if life.phase is Phase.ABORTED:
        return life.mirrored and life.asked is Ending.ABORT and not life.cancelled
    return life.phase in {Phase.PIVOTED, Phase.FINISHED}


async def _remove_marks(copy: Copy, picture: Graph) -> None:
    for bitmap in picture.nodes[copy.target_node].bitmaps:
        if names.parse_bitmap(bitmap.name) is not None:
            mark = {"node": copy.target_node, "name": bitmap.name}
            await attempt(copy.monitor, Command("block-dirty-bitmap-remove", mark))


def _target_nodes(copy: Copy) -> list[str]:
    return [names.node_name(copy.name.run, role) for role in ("format", "base", "data", "storage")]


async def _let_go_of_source(copy: Copy, picture: Graph) -> list[str]:
    """Close what the pivot has replaced, and what only that needed."""
    if Flag.KEEP_SOURCE in copy.name.flags:
        return []
    replaced = (copy.name.source, *copy.name.replaced)
    left = await _delete(copy.monitor, picture, replaced)
    earlier = names.parse_node(copy.name.source)
    if earlier is not None:
        # The source was a copy of ours: a secret or credentials of that run may be left.
        await _delete_objects(copy.monitor, earlier[0], frozenset({Flag.OBJECTS}))
    return left


async def _delete_objects(monitor: Monitor, run: str, flags: frozenset[Flag]) -> None:
    if Flag.OBJECTS in flags:
        for role in ("secret", "tls"):
            name = names.node_name(run, role)
            await attempt(monitor, Command("object-del", {"id": name}))


async def _delete(monitor: Monitor, picture: Graph, nodes: Sequence[str]) -> list[str]:
    """Delete nodes; describe those that should be gone and are not."""
    failed = {}
    for name in nodes:
        # Nodes that QEMU has named itself go with the node above them.
        if name in picture.nodes and picture.nodes[name].named_by_user:
            reason = await attempt(monitor, Command("blockdev-del", {"node-name": name}))
            if reason:
                failed[name] = reason
    if not failed:
        return []
    now = await graph.read(monitor)
    return [
        f"node {name}: {reason}"
        for name, reason in failed.items()
        if name in now.nodes and not now.users.get(name) and not now.parents(name)
    ]


def _remove_worthless_file(copy: Copy, before: Graph, active: Active) -> bool:
    """Remove a half-written copy that this run created: it looks like a good one."""
    ours = Flag.CREATED in copy.name.flags and discover.sees_our_files(copy.monitor.pid)
    if not ours or active is not Active.SOURCE:
        return False
    data = names.node_name(copy.name.run, "data")
    if Flag.DATA_FILE in copy.name.flags and data in before.nodes:
        remove_file(before.path(data))
    return remove_file(copy.destination)


def _failure(
    copy: Copy, error: str, active: Active, where: str, left: Sequence[str]
) -> errors.JobFailed:
    reason = error
    if not reason and active is Active.SOURCE:
        reason = "somebody dismissed its job before the error could be read"
    reason = reason or "the disk has another image now, or is gone"
    description = f"the copy of {copy.disk.name} failed: {reason}"
    if active is Active.SOURCE:
        description += f"; the guest runs on {where}, which is complete"
    failure = errors.JobFailed(description, job_id=copy.id, reason=reason, authoritative=where)
    failure.left = tuple(left)
    return failure
