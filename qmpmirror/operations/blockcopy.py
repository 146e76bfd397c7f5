# SPDX-License-Identifier: MIT
"""blockcopy: copy a disk under a live guest, then switch to the copy, or keep it.

This carries out a plan; a start that fails takes everything back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qmpmirror import errors
from qmpmirror.job import Job
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.options import DRIVE_MIRROR
from qmpmirror.operations.starting import start_job, taken_back_on_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.plan import Plan
    from qmpmirror.schema import Schema
    from qmpmirror.undo import Undo

_BUSY: Final = ("Need a root block node", "in use by block job")
"""What QEMU says when somebody else was faster than we."""
_DRIVER_HINT: Final = (
    "QEMU knows it but cannot load it: qemu-block-extra or the like may be missing"
)


async def start(
    monitor: Monitor, schema: Schema, plan: Plan, *, make: Callable[..., Copy] = Copy
) -> Copy:
    """Carry a plan out; return once the job runs, as what ``make`` makes of it.

    Cancelling this, or any error, takes back what was done: the block graph is as before, and a
    file that this run created is removed.

    Raises:
        CommandFailed: QEMU refused a command.
        ConnectionLost: the connection ended; what was done is still there, for `recover`.
    """
    job = Job(monitor, str(plan.job))
    try:
        async with taken_back_on_error(job) as undo:
            await _carry_out(job, plan, undo)
    except errors.CommandFailed as error:
        explained = _explained(error, plan)
        explained.left = error.left
        raise explained from error
    return make(
        monitor=monitor,
        schema=schema,
        job=job,
        name=plan.job,
        disk=plan.disk,
        destination=plan.destination.text,
        format=plan.format,
        backing=plan.backing,
    )


async def _carry_out(job: Job, plan: Plan, undo: Undo) -> None:
    for step in plan.prepare:
        await step.run(job.monitor, undo)
    await start_job(job, plan.mirror, undo, stops=plan.job if plan.stops_vcpus else None)
    for step in plan.last:
        await step.run(job.monitor, undo)
    await job.refresh()


def _explained(error: errors.CommandFailed, plan: Plan) -> errors.Error:
    """QEMU's reason, with what it was about."""
    path = plan.destination.text
    if error.command == plan.mirror.name and any(words in error.reason for words in _BUSY):
        return errors.DiskBusy(
            f"disk {plan.disk.name!r} has got a block job meanwhile, or another user:"
            f" {error.reason}",
            disk=plan.disk.name,
            job_id="",
        )
    # drive-mirror creates and opens it as well, but has other reasons to fail too.
    opened_by_mirror = error.command == DRIVE_MIRROR and f"'{path}'" in error.reason
    if opened_by_mirror or error.command in {"blockdev-create", "blockdev-add"}:
        reason = " ".join(error.reason.split())
        hint = _DRIVER_HINT if reason.startswith("Unknown driver") else ""
        return errors.DestinationError(f"{path}: {reason}", destination=path, hint=hint)
    return error
