# SPDX-License-Identifier: MIT
"""Stopping the vCPUs for an instant: some QEMUs miss writes while a mirror starts."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpmirror import errors
from qmpmirror.names import Flag, Mark
from qmpmirror.operations import marks
from qmpmirror.steps import Command, Execute
from qmpmirror.undo import Undo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.job import Job
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName
    from qmpmirror.schema import Schema


async def misses_writes_at_start(monitor: Monitor, schema: Schema) -> bool:
    """Whether this QEMU loses writes that come while a mirror starts.

    "mirror: Fix missed dirty bitmap writes during startup" is in 10.0.10, 10.2.2 and 11.0; the bug
    came with 8.2. No schema shows it, so this is the one place where a version decides: on caution.
    """
    if not schema.has_command("stop"):
        return False
    version = (await monitor.execute("query-version"))["qemu"]
    number = (version["major"], version["minor"], version["micro"])
    affected = (8, 2, 0) <= number < (10, 0, 10) or (10, 1, 0) <= number < (10, 2, 2)
    return affected and (await monitor.execute("query-status"))["running"]


def stop_marks(name: JobName) -> list[Execute]:
    """The bitmap that tells a later process that it was this run that stopped the vCPUs."""
    if Flag.DRIVE_MIRROR in name.flags:
        return []  # its target node is not there yet
    where = name.target_node, name.run, Mark.STOPPED
    return [Execute(marks.add(*where), marks.remove(*where))]


async def can_stop(monitor: Monitor) -> bool:
    """Whether there are vCPUs, and they run."""
    try:
        status = await monitor.execute("query-status")
    except errors.CommandFailed:
        return False  # a storage daemon
    return bool(status["running"])


@asynccontextmanager
async def vcpus_stopped(monitor: Monitor, name: JobName | None) -> AsyncIterator[None]:
    """Stop the vCPUs, marked as this job's doing; do nothing without a name."""
    if name is None:
        yield
        return
    undo = Undo()
    try:
        for step in stop_marks(name):
            await step.run(monitor, undo)
        undo.command(monitor, Command("cont"))
        await monitor.execute("stop")
        yield
    finally:
        # In any case: nothing is worse than a guest that stands still.
        await undo.run()


async def initialized(job: Job) -> None:
    """Wait until a mirror has looked through its source: from then on it misses no write."""
    while not job.life.mirrored and not job.life.concluded:
        found = await job.refresh()
        if found is None or found.total:
            return
        await asyncio.sleep(0.01)
