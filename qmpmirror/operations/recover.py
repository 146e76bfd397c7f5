# SPDX-License-Identifier: MIT
"""recover: what an interrupted run left in QEMU, finished or undone.

QEMU is asked, nobody else: a run is known by the names of its jobs, nodes and bitmaps. Nothing
without our names is touched, except the nodes that a pivot has replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover, disks, errors, names, runs
from qmpmirror.job import JobStatus
from qmpmirror.life import Ending
from qmpmirror.names import Flag
from qmpmirror.operations.blockjob import attach_ours, disk_of
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.findings import (
    Finding,
    State,
    Way,
    done,
    ending_of,
    intention,
    state_of,
)
from qmpmirror.operations.group import CopyGroup
from qmpmirror.operations.leftovers import close_replaced, tidy, undo_creation
from qmpmirror.operations.migration_recovery import interrupted, recover_migrations
from qmpmirror.operations.onephase import put_away
from qmpmirror.operations.release import release_all
from qmpmirror.operations.twophase import TwoPhaseJob
from qmpmirror.steps import Command, attempt, remove_file

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.handle import BlockJob
    from qmpmirror.operations.onephase import OnePhaseJob
    from qmpmirror.runs import Run
    from qmpmirror.schema import Schema


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
        way: what to do with a job that runs and that nobody has asked to end. `Way.FINISH` waits
            for the mirroring phase, then does what the run was started for: a pivot if it said so,
            else a finish; a job of one phase is waited for.
        dry_run: change nothing, only tell.

    Raises:
        ConnectionLost: the connection ended.
    """
    findings = await _put_away_pulls(monitor, dry_run=dry_run)
    if findings and dry_run:
        return findings  # some QEMUs crash when more is asked now
    findings += await _end_migrations(monitor, findings, way, dry_run=dry_run)
    picture, found = await _read(monitor, findings, dry_run=dry_run)
    if not dry_run and await release_all(monitor, found):
        picture, found = await _read(monitor, findings)
    if way is Way.FINISH and not dry_run:
        findings += await _finish_groups(monitor, schema, picture, found)
        picture, found = await _read(monitor, findings)
    folder = discover.working_folder(monitor.pid)
    known = await disks.read(monitor, picture, folder)
    for run in found:
        if not dry_run:
            await tidy(monitor, run)
        if run.replaced and run.job is None:
            findings.append(await close_replaced(monitor, run, dry_run=dry_run))
        elif run.job is None and not run.is_unfinished(picture):
            continue
        elif run.job is None:
            findings.append(await undo_creation(monitor, picture, run, way, dry_run=dry_run))
        else:
            disk = disk_of(run, run.job, known) or _without_disk(run, picture)
            findings.append(await _recover_job(monitor, schema, picture, run, disk, way, dry_run))
    return findings


async def _end_migrations(
    monitor: Monitor, findings: list[Finding], way: Way, *, dry_run: bool
) -> list[Finding]:
    picture, found = await _look(monitor, findings, dry_run=dry_run)
    migrations = interrupted(found)
    if not migrations:
        return []
    known = await disks.read(monitor, picture, discover.working_folder(monitor.pid))
    return await recover_migrations(monitor, picture, migrations, known, way, dry_run=dry_run)


async def _read(
    monitor: Monitor, findings: list[Finding], *, dry_run: bool = False
) -> tuple[Graph, list[Run]]:
    """The block graph, and our runs in it that are no part of a migration."""
    picture, found = await _look(monitor, findings, dry_run=dry_run)
    theirs = {run.id for each in interrupted(found) for run in each.runs}
    return picture, [run for run in found if run.id not in theirs]


async def _look(
    monitor: Monitor, findings: list[Finding], *, dry_run: bool
) -> tuple[Graph, list[Run]]:
    """The block graph and our runs, when pulls that have ended meanwhile are out of the way."""
    while True:
        try:
            return await runs.read(monitor)
        except errors.Refused:
            ended = [] if dry_run else await _put_away_pulls(monitor, dry_run=False)
            if not ended:
                raise
            findings += ended


async def _put_away_pulls(monitor: Monitor, *, dry_run: bool) -> list[Finding]:
    """Pulls that have ended come first, without a look at the graph: 7.2 crashes in it."""
    findings = []
    for status in map(JobStatus.parse, await monitor.execute("query-jobs")):
        name = names.parse_job(status.id)
        if name is None or name.verb != "pull" or status.status != "concluded":
            continue
        finding = Finding(name.run, "pull", State.ENDED, "", "", "", "would be put away")
        if not dry_run:
            if status.error:
                await attempt(monitor, Command("job-dismiss", {"id": status.id}))
            else:
                await put_away(monitor, name)
            why = f": it had failed: {status.error}" if status.error else ""
            finding = attrs.evolve(finding, action=f"put away{why}")
        findings.append(finding)
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
        if run.job is None or Flag.GROUP not in run.job.name.flags:
            continue
        group = names.group_of(run.id)
        disk = disk_of(run, run.job, known)
        if disk is None or run.job.status.status == "concluded":
            broken.add(group)
            continue
        await _dismiss_created(monitor, run)
        copy = await attach_ours(monitor, schema, picture, run, disk)
        assert isinstance(copy, Copy)  # noqa: S101 - nothing else has the flag
        groups.setdefault(group, {})[run.id] = copy
    findings = []
    for group, copies in groups.items():
        # It was started last.
        whole = group not in broken and names.member_run(group, 0) in copies
        findings += await _finish_group(CopyGroup(group, list(copies.values())), whole=whole)
    return findings


async def _finish_group(together: CopyGroup, *, whole: bool) -> list[Finding]:
    states = [state_of(copy.job.life) for copy in together.copies]
    try:
        if not whole:
            await together.roll_back()
        else:
            await together.ready()
            pivots = ending_of(together.copies[0].name) is Ending.PIVOT
            await (together.pivot() if pivots else together.finish())
    except (errors.JobError, errors.DeadlineExceeded):
        pass  # all were rolled back
    if together.result is None:
        return []  # what has become of them is found in a moment
    return [
        Finding(
            run=copy.name.run,
            what=copy.what,
            state=state,
            disk=result.disk,
            destination=result.destination,
            active=result.active,
            action=done(copy.name, result),
            left=result.left,
        )
        for copy, state, result in zip(
            together.copies, states, together.result.results, strict=True
        )
    ]


async def _recover_job(  # noqa: PLR0917 - the run and all that is needed to act on it
    monitor: Monitor,
    schema: Schema,
    picture: Graph,
    run: Run,
    disk: Disk,
    way: Way,
    dry_run: bool,
) -> Finding:
    job = await attach_ours(monitor, schema, picture, run, disk)
    try:
        life = job.job.life
        state = state_of(life)
        finding = Finding(run.id, job.what, state, disk.name, job.destination, disk.path, "")
        unasked = state in {State.COPYING, State.MIRRORING}
        stopped = await _stopped(job) if unasked and way is not Way.UNDO else ""
        if dry_run:
            would = f"would be left: {stopped}" if stopped else ""
            action = would or intention(job.name, life.asked, state, way)
            return attrs.evolve(finding, action=action)
        temporary = Flag.TEMPORARY in job.name.flags
        if not temporary:
            await _dismiss_created(monitor, run)
        if stopped:
            return attrs.evolve(finding, action=f"left: {stopped}")
        if unasked and way is Way.LEAVE:
            return attrs.evolve(finding, action="left running")
        try:
            ending = _end(job, state, way) if isinstance(job, TwoPhaseJob) else _let_end(job, way)
            result = await ending
        except errors.JobFailed as failure:
            return attrs.evolve(
                finding,
                active=failure.authoritative,
                action=f"put away: it had failed: {failure.reason}",
                left=failure.left,
            )
        action = done(job.name, result)
        if temporary:
            # Its node may be closed by now: the job that created the file knows it too.
            remove_file(run.file.name.source if run.file else job.destination)
            await _dismiss_created(monitor, run)
            action = "put away: the copy was to be temporary"
        return attrs.evolve(finding, active=result.active, action=action, left=result.left)
    finally:
        job.job.close()


async def _stopped(job: BlockJob) -> str:
    """Why a job cannot go on by itself; empty when it can."""
    info = await job.info()
    if not info.paused or info.io_status == "ok":
        return ""
    return f"an I/O error has stopped it ({info.io_status}): make room, then blockjob --resume"


async def _dismiss_created(monitor: Monitor, run: Run) -> None:
    """The copy's own job is QEMU's record of the run now."""
    for created in (run.data, run.file):
        if created is not None:
            await attempt(monitor, Command("job-dismiss", {"id": created.status.id}))


async def _end(job: TwoPhaseJob, state: State, way: Way) -> Result:
    unwanted = way is Way.UNDO or Flag.TEMPORARY in job.name.flags
    if unwanted and state is not State.ENDED:
        return await job.abort(force=True)
    if state in {State.ENDED, State.ENDING}:
        return await job.resume_ending()
    await job.ready()
    return await (job.pivot() if ending_of(job.name) is Ending.PIVOT else job.finish())


async def _let_end(job: OnePhaseJob, way: Way) -> Result:
    if way is Way.UNDO:
        return await job.abort()
    result = await job.end()
    return result or await job.conclude()


def _without_disk(run: Run, picture: Graph) -> Disk:
    """A stand-in for a disk that is gone: it was unplugged while its job ran."""
    source = run.job.name.source if run.job else ""
    image = picture.nodes.get(source)
    path = picture.location(source) if image else ""
    return disks.Disk(source, "", "", "(gone)", "", image, path)
