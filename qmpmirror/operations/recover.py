# SPDX-License-Identifier: MIT
"""recover: what an interrupted run left in QEMU, finished or undone.

QEMU is asked, nobody else: a run is known by the names of its jobs, nodes and bitmaps. Nothing
without our names is touched, except the nodes that a pivot has replaced.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover, disks, errors, names, runs
from qmpmirror.life import Ending, Phase
from qmpmirror.names import Flag, Mark
from qmpmirror.operations.blockjob import attach_copy, disk_of
from qmpmirror.operations.group import CopyGroup
from qmpmirror.operations.release import release_all
from qmpmirror.steps import Command, attempt, cancel_job, remove_file

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.runs import OurJob, Run
    from qmpmirror.schema import Schema


class Way(enum.Enum):
    """What to do with a copy whose ending nobody has asked for yet."""

    LEAVE = "leave"
    FINISH = "finish"
    UNDO = "undo"


class State(enum.Enum):
    """How far an interrupted run had come."""

    CREATING = "creating the image"
    COPYING = "copying"
    MIRRORING = "mirroring"
    ENDING = "ending"
    ENDED = "ended"


@attrs.frozen
class Finding:
    """One interrupted run.

    Attributes:
        run: its id.
        state: how far it had come.
        disk: the disk's name; empty when the run had not come so far.
        destination: where its copy is.
        active: the image that the guest uses; empty when no disk is known.
        action: what was done, or is going to be done.
        left: what could not be cleaned up, one entry each.
    """

    run: str
    state: State
    disk: str
    destination: str
    active: str
    action: str
    left: tuple[str, ...] = ()


async def recover(
    monitor: Monitor, schema: Schema, way: Way = Way.LEAVE, *, dry_run: bool = False
) -> list[Finding]:
    """Finish or undo what interrupted runs have left.

    An ending that was asked for is seen through, whatever ``way`` is, except that `Way.UNDO`
    overrules it as long as QEMU lets it. What had not come as far as a job is undone. Cancelling
    this is safe: it can be called again.

    Args:
        monitor: the QEMU.
        schema: what it can do.
        way: what to do with a copy that runs and that nobody has asked to end. `Way.FINISH` waits
            for the mirroring phase, then does what the run was started for: a pivot if it said so,
            else a finish.
        dry_run: change nothing, only tell.

    Raises:
        ConnectionLost: the connection ended.
    """
    picture, found = await runs.read(monitor)
    if not dry_run and await release_all(monitor, found):
        picture, found = await runs.read(monitor)
    findings: list[Finding] = []
    if way is Way.FINISH and not dry_run:
        findings += await _finish_groups(monitor, schema, picture, found)
        picture, found = await runs.read(monitor)
    folder = discover.working_folder(monitor.pid)
    known = await disks.read(monitor, picture, folder)
    for run in found:
        if not dry_run:
            await _tidy(monitor, run)
        if run.copy is None and not run.is_unfinished(picture):
            continue
        if run.copy is None:
            findings.append(await _undo_creation(monitor, picture, run, way, dry_run=dry_run))
            continue
        disk = disk_of(run, run.copy, known)
        if disk is None:
            disk = _without_disk(run, picture)
        findings.append(await _recover_copy(monitor, schema, picture, run, disk, way, dry_run))
    return findings


async def _finish_groups(
    monitor: Monitor, schema: Schema, picture: Graph, found: list[Run]
) -> list[Finding]:
    """End the disks of an interrupted group together, as they were meant to be."""
    folder = discover.working_folder(monitor.pid)
    known = await disks.read(monitor, picture, folder)
    groups: dict[str, dict[str, Copy]] = {}
    broken: set[str] = set()
    for run in found:
        if run.copy is None or Flag.GROUP not in run.copy.name.flags:
            continue
        group = names.group_of(run.id)
        disk = disk_of(run, run.copy, known)
        if disk is None or run.copy.status.status == "concluded":
            broken.add(group)
            continue
        for created in (run.data, run.file):
            if created is not None:
                await attempt(monitor, Command("job-dismiss", {"id": created.status.id}))
        copy = await attach_copy(monitor, schema, picture, run, disk)
        groups.setdefault(group, {})[run.id] = copy
    findings = []
    for group, copies in groups.items():
        # It was started last.
        whole = group not in broken and names.member_run(group, 0) in copies
        findings += await _finish_group(CopyGroup(group, list(copies.values())), whole=whole)
    return findings


async def _finish_group(together: CopyGroup, *, whole: bool) -> list[Finding]:
    states = [_state(copy) for copy in together.copies]
    try:
        if not whole:
            await together.roll_back()
        else:
            await together.ready()
            pivots = Flag.THEN_PIVOT in together.copies[0].name.flags
            await (together.pivot() if pivots else together.finish())
    except (errors.JobError, errors.DeadlineExceeded):
        pass  # all were rolled back
    if together.result is None:
        return []  # what has become of them is found in a moment
    return [
        Finding(
            run=copy.name.run,
            state=state,
            disk=result.disk,
            destination=result.destination,
            active=result.active,
            action=_done(result),
            left=result.left,
        )
        for copy, state, result in zip(
            together.copies, states, together.result.results, strict=True
        )
    ]


async def _recover_copy(  # noqa: PLR0917 - the run and all that is needed to act on it
    monitor: Monitor,
    schema: Schema,
    picture: Graph,
    run: Run,
    disk: Disk,
    way: Way,
    dry_run: bool,
) -> Finding:
    copy = await attach_copy(monitor, schema, picture, run, disk)
    try:
        state = _state(copy)
        finding = Finding(run.id, state, disk.name, copy.destination, disk.path, "")
        if dry_run:
            return attrs.evolve(finding, action=_intention(copy, state, way))
        for created in (run.data, run.file):
            if created is not None:
                await attempt(monitor, Command("job-dismiss", {"id": created.status.id}))
        if state in {State.COPYING, State.MIRRORING} and way is Way.LEAVE:
            return attrs.evolve(finding, action="left running")
        try:
            result = await _end(copy, state, way)
        except errors.JobFailed as failure:
            return attrs.evolve(
                finding,
                active=failure.authoritative,
                action=f"put away: it had failed: {failure.reason}",
                left=failure.left,
            )
        return attrs.evolve(finding, active=result.active, action=_done(result), left=result.left)
    finally:
        copy.job.close()


def _state(copy: Copy) -> State:
    life = copy.job.life
    if life.concluded:
        return State.ENDED
    if life.asked is not None:
        return State.ENDING
    return State.MIRRORING if life.mirrored else State.COPYING


async def _end(copy: Copy, state: State, way: Way) -> Result:
    if way is Way.UNDO and state is not State.ENDED:
        return await copy.abort(force=True)
    if state in {State.ENDED, State.ENDING}:
        return await copy.resume_ending()
    await copy.ready()
    return await (copy.pivot() if Flag.THEN_PIVOT in copy.name.flags else copy.finish())


def _intention(copy: Copy, state: State, way: Way) -> str:
    if state is State.ENDED:
        return "would be put away"
    if way is Way.UNDO:
        return "would be aborted"
    if state is State.ENDING and Flag.GROUP in copy.name.flags:
        return "would be rolled back with its group, or finalized if that was cut"
    if state is State.ENDING:
        asked = copy.job.life.asked
        return f"would be seen through: {asked.value if asked else ''}"
    if way is Way.LEAVE:
        return "would be left running"
    ending = Ending.PIVOT if Flag.THEN_PIVOT in copy.name.flags else Ending.FINISH
    return f"would {ending.value} in the mirroring phase"


def _done(result: Result) -> str:
    if result.outcome is Phase.FAILED:
        return f"put away: it had failed: {'; '.join(result.notes)}"
    if result.outcome is Phase.PIVOTED:
        return "pivoted"
    if result.outcome is Phase.FINISHED:
        return "finished: the copy is consistent"
    if result.removed:
        return "aborted: the incomplete copy was removed"
    return f"aborted: the copy is {'consistent' if result.consistent else 'not usable'}"


def _without_disk(run: Run, picture: Graph) -> Disk:
    """A stand-in for a disk that is gone: it was unplugged while its copy ran."""
    source = run.copy.name.source if run.copy else ""
    image = picture.nodes.get(source)
    path = picture.location(source) if image else ""
    return disks.Disk(source, "", "", "(gone)", "", image, path)


async def _undo_creation(
    monitor: Monitor, picture: Graph, run: Run, way: Way, *, dry_run: bool
) -> Finding:
    """Take back what was prepared for a copy that never started."""
    path = run.file.name.source if run.file else ""
    finding = Finding(run.id, State.CREATING, "", path, "", "would be undone")
    if way is Way.LEAVE and run.is_creating:
        # A large image takes its time, and whoever creates it may well be alive.
        return attrs.evolve(finding, action="left running")
    if dry_run:
        return finding
    if run.header is not None:
        await cancel_job(monitor, run.header.status.id)
    left = []
    for role in ("format", "base", "data", "storage"):
        name = names.node_name(run.id, role)
        if name in picture.nodes:
            reason = await attempt(monitor, Command("blockdev-del", {"node-name": name}))
            left += [f"node {name}: {reason}"] if reason else []
    for role in ("secret", "tls"):
        await attempt(monitor, Command("object-del", {"id": names.node_name(run.id, role)}))
    removed = False
    for job in (run.data, run.file):
        if job is not None:
            removed |= await _undo_file(monitor, job, keep=bool(left))
    action = "undone, and the file was removed" if removed else "undone"
    return attrs.evolve(finding, action=action, left=tuple(left))


async def _undo_file(monitor: Monitor, job: OurJob, *, keep: bool) -> bool:
    """Remove the file that a job created, unless it was there before; then the job."""
    await attempt(monitor, Command("job-cancel", {"id": job.status.id}))
    ours = Flag.CREATED in job.name.flags and discover.sees_our_files(monitor.pid)
    removed = ours and not keep and remove_file(job.name.source)
    # Last: until then it is QEMU's record of the file.
    await cancel_job(monitor, job.status.id)
    return removed


async def _tidy(monitor: Monitor, run: Run) -> None:
    """Put away what is small and wanted by nobody, whatever becomes of the run."""
    if Mark.STOPPED in run.marks:
        # It stopped the vCPUs for an instant and died in it.
        await attempt(monitor, Command("cont"))
    stale = run.marks if run.copy is None else run.marks & {Mark.STOPPED}
    for mark in stale:
        bitmap = {"node": run.target_node, "name": names.bitmap_name(run.id, mark)}
        await attempt(monitor, Command("block-dirty-bitmap-remove", bitmap))
    if "probe" in run.roles:
        # It only looked whether a file is there.
        probe = {"node-name": names.node_name(run.id, "probe")}
        await attempt(monitor, Command("blockdev-del", probe))
