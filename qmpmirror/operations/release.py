# SPDX-License-Identifier: MIT
"""Let the disks of a group go on whose client died in the middle of a cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror import names, runs
from qmpmirror.names import Flag
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.runs import OurJob

_ENDING = frozenset({"ready", "standby", "waiting", "pending"})


async def release_group(monitor: Monitor, group: str) -> None:
    """Finalize the group when its cut was made, else cancel what waits for it.

    All members were pending when the first was finalized, so finalizing the rest keeps the cut. As
    long as none was, cancelling leaves every disk as it was.
    """
    _, found = await runs.read(monitor)
    members = [run for run in found if run.copy and names.group_of(run.id) == group]
    jobs = [run.copy for run in members if run.copy and Flag.GROUP in run.copy.name.flags]
    asked = [run.copy for run in members if run.copy and run.asked is not None]
    cut_made = any(job.status.status == "concluded" and not job.status.error for job in jobs)
    verb = "job-finalize" if cut_made else "job-cancel"
    for job in _waiting(asked):
        await attempt(monitor, Command(verb, {"id": job.status.id}))


async def release_all(monitor: Monitor, found: list[runs.Run]) -> bool:
    """Release every group that has a pending member; whether there was one."""
    pending = {
        names.group_of(run.id)
        for run in found
        if run.copy and run.copy.status.status == "pending" and Flag.GROUP in run.copy.name.flags
    }
    for group in pending:
        await release_group(monitor, group)
    return bool(pending)


def _waiting(jobs: list[OurJob]) -> list[OurJob]:
    return [job for job in jobs if job.status.status in _ENDING]
