# SPDX-License-Identifier: MIT
"""The end of a copy: what has really happened, and what is to be put away.

A finish and a pivot give the same events, and a failed job may have switched the guest: only the
graph tells. The job is dismissed last: until then it is QEMU's record of what belongs to the run,
and another process could do the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import discover, disks, errors, graph, launch, names, sizes
from qmpmirror.life import Active, Ending, Life, Phase
from qmpmirror.names import Flag, Mark
from qmpmirror.operations import marks
from qmpmirror.steps import Command, attempt, remove_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.twophase import TwoPhaseJob
    from qmpmirror.sizes import ImageSize

_FILE_ROLES: Final = ("data", "storage")


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
        deleted: the paths of committed images that were removed, as was asked for.
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
    deleted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_size: ImageSize | None = None
    destination_size: ImageSize | None = None
    launch: tuple[str, ...] = ()


async def conclude(job: TwoPhaseJob) -> Result:
    """Put an ended job away and say how it has ended.

    Raises:
        JobFailed: it failed.
    """
    monitor, life = job.monitor, job.job.life
    ended = await job.job.refresh()
    error = ended.error if ended else job.job.error
    job.job.close()
    picture = await graph.read(monitor)
    active, where = await _authoritative(job, picture, error)
    outcome = life.conclude(error, active)
    consistent = _is_consistent(life, only_by_pivot=job.only_by_pivot)
    words: tuple[str, ...] = ()
    deleted: list[str] = []
    removed = False
    if outcome is Phase.PIVOTED:
        run = job.name.run if Flag.OBJECTS in job.name.flags else ""
        opened = await launch.read(monitor, picture, job.disk, job.target_node, run)
        words = tuple(launch.options(job.disk, where, job.format, opened))
        await _remove_marks(job, picture)
        left = await _let_go_of_source(job, picture)
        job.tidy_files(pivoted=True)
        deleted = [path for path in job.image_files() if not left and remove_file(path)]
    else:
        # The nodes of its files come last: they tell another process where these are.
        files = {names.node_name(job.name.run, role) for role in _FILE_ROLES}
        others = [node for node in job.own_nodes if node not in files]
        left = await _let_go_of(monitor, picture, others)
        if not job.own_nodes:  # else they have gone with the target
            await _remove_marks(job, picture)
        await _delete_objects(monitor, job.name.run, job.name.flags)
        removed = not consistent and not left and _remove_worthless_file(job, picture, active)
        left += await _let_go_of(monitor, picture, [n for n in job.own_nodes if n in files])
    await job.job.dismiss()
    if outcome is Phase.FAILED:
        failure = _failure(job, error, active, where, removed=removed)
        failure.left = tuple(left)
        raise failure
    return Result(
        outcome=outcome,
        disk=job.disk.name,
        source=job.disk.path,
        destination=job.destination,
        active=where,
        consistent=consistent,
        removed=removed,
        deleted=tuple(deleted),
        left=tuple(left),
        notes=tuple(job.notes),
        source_size=job.measure_source(picture) or job.source_size,
        destination_size=None if removed else sizes.of_image(picture, job.target_node),
        launch=words,
    )


async def _authoritative(job: TwoPhaseJob, picture: Graph, error: str) -> tuple[Active, str]:
    """The image that the guest uses, whatever was meant."""
    folder = discover.working_folder(job.monitor.pid)
    source, target = job.name.source, job.target_node
    if job.disk.qom_path:
        for disk in await disks.read(job.monitor, picture, folder):
            if disk.is_under(job.disk) and disk.image is not None:
                known = {source: Active.SOURCE, target: Active.TARGET}
                return known.get(disk.image.name, Active.OTHER), disk.path
        return Active.OTHER, ""
    # A node without a device: what used the source, such as an export, moves with a pivot.
    if any(user.kind == "block-backend" for user in picture.users.get(target, ())):
        return Active.TARGET, job.destination
    life = job.job.life
    unused = not any(user.kind == "block-backend" for user in picture.users.get(source, ()))
    if unused and life.asked is Ending.PIVOT and not error and not life.cancelled:
        return Active.TARGET, job.destination
    return Active.SOURCE, job.disk.path


def _is_consistent(life: Life, *, only_by_pivot: bool) -> bool:
    if only_by_pivot:
        return life.phase is Phase.PIVOTED
    if life.phase is Phase.ABORTED:
        return life.mirrored and life.asked is Ending.ABORT and not life.cancelled
    return life.phase in {Phase.PIVOTED, Phase.FINISHED}


async def _remove_marks(job: TwoPhaseJob, picture: Graph) -> None:
    target = picture.nodes.get(job.target_node)
    for bitmap in target.bitmaps if target else ():
        if names.parse_bitmap(bitmap.name) is not None:
            mark = {"node": job.target_node, "name": bitmap.name}
            await attempt(job.monitor, Command("block-dirty-bitmap-remove", mark))


async def _let_go_of_source(job: TwoPhaseJob, picture: Graph) -> list[str]:
    """Close what the pivot has replaced, and what only that needed."""
    earlier = names.parse_node(job.name.source)
    if Flag.KEEP_SOURCE in job.name.flags:
        if earlier is not None:
            # A copy of ours that nobody uses looks like one that was interrupted.
            await attempt(job.monitor, marks.add(job.name.source, earlier[0], Mark.KEPT))
        return []
    replaced = (job.name.source, *job.name.replaced)
    left = await _let_go_of(job.monitor, picture, replaced)
    if earlier is not None:
        # The source was a copy of ours: a secret or credentials of that run may be left.
        await _delete_objects(job.monitor, earlier[0], frozenset({Flag.OBJECTS}))
    return left


async def _delete_objects(monitor: Monitor, run: str, flags: frozenset[Flag]) -> None:
    if Flag.OBJECTS in flags:
        for role in ("secret", "tls"):
            name = names.node_name(run, role)
            await attempt(monitor, Command("object-del", {"id": name}))


async def delete_nodes(monitor: Monitor, nodes: Iterable[str]) -> dict[str, str]:
    """Delete nodes (``blockdev-del``); return what QEMU said where it refused.

    Nodes that QEMU has named itself go with the node above them.
    """
    refused = {}
    for name in nodes:
        if not name.startswith("#"):
            reason = await attempt(monitor, Command("blockdev-del", {"node-name": name}))
            if reason:
                refused[name] = reason
    return refused


def left_of(picture: Graph, refused: Mapping[str, str]) -> list[str]:
    """Describe the nodes that should be gone and are not."""
    return [
        f"node {name}: {reason}"
        for name, reason in refused.items()
        if name in picture.nodes and not picture.users.get(name) and not picture.parents(name)
    ]


async def _let_go_of(monitor: Monitor, picture: Graph, nodes: Sequence[str]) -> list[str]:
    """Delete those of the nodes that are there; describe those that should be gone and are not."""
    refused = await delete_nodes(monitor, [name for name in nodes if name in picture.nodes])
    return left_of(await graph.read(monitor), refused) if refused else []


def _remove_worthless_file(job: TwoPhaseJob, before: Graph, active: Active) -> bool:
    """Remove a half-written copy that this run created: it looks like a good one."""
    ours = Flag.CREATED in job.name.flags and discover.sees_our_files(job.monitor.pid)
    if not ours or active is not Active.SOURCE:
        return False
    data = names.node_name(job.name.run, "data")
    if Flag.DATA_FILE in job.name.flags and data in before.nodes:
        remove_file(before.path(data))
    job.tidy_files(pivoted=False)
    return remove_file(job.destination)


def _failure(
    job: TwoPhaseJob, error: str, active: Active, where: str, *, removed: bool
) -> errors.JobFailed:
    reason = error
    if not reason and active is Active.SOURCE:
        reason = "somebody dismissed its job before the error could be read"
    reason = reason or "the disk has another image now, or is gone"
    description = f"the {job.what} of {job.disk.name} failed: {reason}"
    if active is Active.SOURCE:
        description += f"; the guest runs on {where}, which is complete"
    return errors.JobFailed(
        description,
        job_id=job.id,
        reason=reason,
        authoritative=where,
        removed=job.destination if removed else "",
    )
