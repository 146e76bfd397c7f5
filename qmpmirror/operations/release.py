# SPDX-License-Identifier: MIT
"""Let the disks of a group go on whose client died in the middle of a cut."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qmpmirror import names, runs
from qmpmirror.job import Job
from qmpmirror.names import Flag
from qmpmirror.operations.cancelling import cancel_by_force
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.runs import OurJob, Run


async def release_group(monitor: Monitor, group: str) -> None:
    """Finalize the group when its cut was made, else cancel all of it.

    All members were pending when the first was finalized, so finalizing the rest keeps the cut. As
    long as none was, cancelling leaves every disk as it was.
    """
    _, found = await runs.read(monitor)
    jobs = [_job(run) for run in found if names.group_of(run.id) == group]
    members = [job for job in jobs if job is not None]
    cut_made = any(job.status.status == "concluded" and not job.status.error for job in members)
    running = [job.status for job in members if job.status.status != "concluded"]
    if cut_made:
        running = [status for status in running if status.status == "pending"]
    # All at once: each of them may be what the guest waits for.
    await asyncio.gather(*(_end(monitor, status.id, finalize=cut_made) for status in running))


async def _end(monitor: Monitor, job_id: str, *, finalize: bool) -> None:
    with Job(monitor, job_id) as job:
        await job.refresh()
        if finalize:
            await attempt(monitor, Command("job-finalize", {"id": job_id}))
        else:
            await cancel_by_force(job)
        await job.wait(lambda life: life.concluded)


async def release_all(monitor: Monitor, found: list[Run]) -> bool:
    """Release every group with a member that was told to end; whether there was one.

    Its client is gone, and one disk must not be ended at another time than the others.
    """
    groups = {
        names.group_of(run.id)
        for run in found
        if (job := _job(run)) is not None
        and job.status.status != "concluded"
        and (run.asked is not None or job.status.status == "pending")
    }
    for group in groups:
        await release_group(monitor, group)
    return bool(groups)


def _job(run: Run) -> OurJob | None:
    """The job of a run that is a member of a group."""
    return run.job if run.job is not None and Flag.GROUP in run.job.name.flags else None
