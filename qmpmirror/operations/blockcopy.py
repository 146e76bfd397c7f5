# SPDX-License-Identifier: MIT
"""blockcopy: copy a disk under a live guest, then switch to the copy, or keep it.

This carries out a plan; a start that fails takes everything back.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qmpmirror import errors
from qmpmirror.job import Job
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.options import DRIVE_MIRROR
from qmpmirror.operations.safe_start import vcpus_stopped
from qmpmirror.steps import cancel_job

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.plan import Plan
    from qmpmirror.schema import Schema


async def start(monitor: Monitor, schema: Schema, plan: Plan) -> Copy:
    """Carry a plan out; return once the job runs.

    Cancelling this, or any error, takes back what was done: the block graph is as before, and a
    file that this run created is removed.

    Raises:
        CommandFailed: QEMU refused a command.
        ConnectionLost: the connection ended; what was done is still there.
    """
    job = Job(monitor, str(plan.job))
    async with AsyncExitStack() as undo:
        try:
            for step in plan.prepare:
                await step.run(monitor, undo)
            undo.enter_context(job)
            undo.push_async_callback(cancel_job, monitor, job.id)
            async with vcpus_stopped(monitor, job, plan.job if plan.stops_vcpus else None):
                await monitor.execute(plan.mirror.name, plan.mirror.arguments)
            for step in plan.last:
                await step.run(monitor, undo)
            await job.refresh()
        except errors.CommandFailed as error:
            raise _explained(error, plan) from error
        undo.pop_all()
    return Copy(
        monitor=monitor,
        schema=schema,
        job=job,
        name=plan.job,
        disk=plan.disk,
        destination=plan.destination.text,
        format=plan.format,
        backing=plan.backing,
    )


def _explained(error: errors.CommandFailed, plan: Plan) -> errors.Error:
    """QEMU's reason, with what it was about."""
    path = plan.destination.text
    # drive-mirror creates and opens it as well, but has other reasons to fail too.
    opened_by_mirror = error.command == DRIVE_MIRROR and f"'{path}'" in error.reason
    if opened_by_mirror or error.command in {"blockdev-create", "blockdev-add"}:
        return errors.DestinationError(f"{path}: {error.reason}", destination=path)
    return error
