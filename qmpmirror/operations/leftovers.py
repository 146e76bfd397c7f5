# SPDX-License-Identifier: MIT
"""What an interrupted run leaves besides its job, and how it is put away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover, graph, names
from qmpmirror.names import Flag, Mark
from qmpmirror.operations import marks
from qmpmirror.operations.conclusion import delete_nodes, left_of
from qmpmirror.operations.findings import Finding, State, Way
from qmpmirror.steps import Command, attempt, cancel_job, remove_file

if TYPE_CHECKING:
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.runs import OurJob, Run


async def undo_creation(
    monitor: Monitor, picture: Graph, run: Run, way: Way, *, dry_run: bool
) -> Finding:
    """Take back what was prepared for a copy that never started."""
    path = run.file.name.source if run.file else ""
    finding = Finding(run.id, "copy", State.CREATING, "", path, "", "would be undone")
    if run.is_used(picture):
        return await _dismiss_all(monitor, run, finding, dry_run=dry_run)
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


async def close_replaced(monitor: Monitor, run: Run, *, dry_run: bool) -> Finding:
    """Close the images that a commit or pull has taken out of their chain."""
    finding = Finding(run.id, "chain", State.ENDED, "", "", "", "would be put away")
    if dry_run:
        return finding
    refused = await delete_nodes(monitor, run.replaced)
    left = left_of(await graph.read(monitor), refused) if refused else []
    for node in run.replaced:
        if node in refused:  # it is in use again
            await attempt(monitor, marks.remove(node, run.id, Mark.REPLACED))
    return attrs.evolve(finding, action="put away", left=tuple(left))


async def _dismiss_all(monitor: Monitor, run: Run, finding: Finding, *, dry_run: bool) -> Finding:
    """The guest runs on the image already: it is an overlay, and the snapshot was taken."""
    done = attrs.evolve(finding, what="snapshot", state=State.ENDED, action="would be put away")
    if dry_run:
        return done
    for job in (run.header, run.data, run.file):
        if job is not None:
            await attempt(monitor, Command("job-dismiss", {"id": job.status.id}))
    return attrs.evolve(done, action="put away: it was taken")


async def _undo_file(monitor: Monitor, job: OurJob, *, keep: bool) -> bool:
    """Remove the file that a job created, unless it was there before; then the job."""
    await attempt(monitor, Command("job-cancel", {"id": job.status.id}))
    ours = Flag.CREATED in job.name.flags and discover.sees_our_files(monitor.pid)
    removed = ours and not keep and remove_file(job.name.source)
    # Last: until then it is QEMU's record of the file.
    await cancel_job(monitor, job.status.id)
    return removed


async def tidy(monitor: Monitor, run: Run) -> None:
    """Put away what is small and wanted by nobody, whatever becomes of the run."""
    if Mark.STOPPED in run.marks:
        # It stopped the vCPUs for an instant and died in it.
        await attempt(monitor, Command("cont"))
    stale = run.marks if run.job is None else run.marks & {Mark.STOPPED}
    for mark in stale:
        await attempt(monitor, marks.remove(run.marked, run.id, mark))
    if "probe" in run.roles:
        # It only looked whether a file is there.
        probe = {"node-name": names.node_name(run.id, "probe")}
        await attempt(monitor, Command("blockdev-del", probe))
