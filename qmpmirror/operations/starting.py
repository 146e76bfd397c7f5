# SPDX-License-Identifier: MIT
"""Starting a job so that nothing is left of it when that fails."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpmirror import errors
from qmpmirror.job import Job
from qmpmirror.operations.cancelling import cancel_by_force
from qmpmirror.operations.safe_start import initialized, vcpus_stopped
from qmpmirror.undo import Undo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName
    from qmpmirror.steps import Command


@asynccontextmanager
async def taken_back_on_error(job: Job) -> AsyncIterator[Undo]:
    """Take back what is registered when the block is left by an error or a cancellation.

    What could not be taken back is told by the error's ``left``. When the connection is lost, all
    is left to `recover`.
    """
    undo = Undo()
    try:
        yield undo
    except BaseException as error:
        left = () if isinstance(error, errors.ConnectionLost) else await undo.run()
        job.close()
        if isinstance(error, errors.Error):
            error.left = left
        raise


async def start_job(job: Job, command: Command, undo: Undo, *, stops: JobName | None) -> None:
    """Watch a job and start it.

    Args:
        job: the job.
        command: what starts it.
        undo: where to register how it is taken back.
        stops: its name, when the vCPUs are to be stopped for the start.
    """
    job.__enter__()
    undo.add(f"cancel job {job.id}", take_away, job.monitor, job.id)
    async with vcpus_stopped(job.monitor, stops):
        await job.monitor.execute(command.name, command.arguments)
        if stops is not None:
            await initialized(job)


async def take_away(monitor: Monitor, job_id: str) -> None:
    """Cancel a job by force, wait for its end, and dismiss it; it is fine if it is gone."""
    with Job(monitor, job_id) as job:
        if await job.refresh() is None:
            return
        if not job.life.concluded:
            await cancel_by_force(job)
            await job.wait(lambda life: life.concluded)
        await job.dismiss()
