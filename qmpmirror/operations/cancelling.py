# SPDX-License-Identifier: MIT
"""Cancelling a mirror by force, also while guest writes wait for its target.

With synchronous writes (``copy-mode=write-blocking``) a guest's write goes to the target before the
guest is told that it is done. A mirror that is cancelled by force does not wait for such writes: it
frees its bitmap of what is in flight, which each of them clears in the end. QEMU then writes to
memory that is somebody else's by now, and ends itself sooner or later (`mirror_run` of
``block/mirror.c``; 5.2 to 11.1). So the writes must have come to their end before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qmpmirror import names
from qmpmirror.names import Flag
from qmpmirror.operations.safe_start import can_stop, vcpus_stopped
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.job import Job

_MIRRORING: Final = frozenset({"ready", "standby"})
_RUNNING: Final = frozenset({"running", "paused", *_MIRRORING})
_SECONDS: Final = 2.0
_SYNCHRONOUS_SECONDS: Final = 10.0


async def cancel_by_force(job: Job, *, pivoting: bool = False, synchronous: bool = False) -> None:
    """Have QEMU cancel a job by force (``job-cancel``); its end is not waited for.

    A mirror in the mirroring phase is told to end by itself first: it does so between two writes,
    and what it has copied counts as worthless all the same. Where that could switch the guest, and
    before the mirroring phase, the vCPUs are stopped for an instant instead. What hangs, because
    its destination does, is cancelled as it is.

    Args:
        job: the job; its status is known.
        pivoting: whether QEMU may have been told to switch the guest.
        synchronous: whether guest writes wait for it, besides what its name says.

    Raises:
        ConnectionLost: the connection ended.
    """
    name = names.parse_job(job.id)
    flags = name.flags if name is not None else frozenset[Flag]()
    synchronous |= Flag.SYNCHRONOUS in flags
    grouped = Flag.GROUP in flags
    if job.life.status in _MIRRORING:
        found = await _look(job)
        synced = found.get("actively-synced")
        synchronous |= bool(synced)
        # Before 8.2 nobody can have made it synchronous meanwhile.
        patience = _SYNCHRONOUS_SECONDS if synchronous else 0.0 if synced is None else _SECONDS
        if patience and not found["paused"] and (grouped or not pivoting):
            await _let_end(job, patience, grouped=grouped)
            synchronous = False
    if job.life.concluded:
        return
    stops = synchronous and job.life.status in _RUNNING and await can_stop(job.monitor)
    async with vcpus_stopped(job.monitor, name if stops else None):
        await attempt(job.monitor, Command("job-cancel", {"id": job.id}))
        if stops:
            await job.wait(lambda life: life.status not in _RUNNING, seconds=_SECONDS)


async def _look(job: Job) -> Mapping[str, Any]:
    """What ``query-block-jobs`` says of it; ``actively-synced`` is not there before 8.2."""
    found = await job.monitor.execute("query-block-jobs")
    return next((each for each in found if each["device"] == job.id), {"paused": True})


async def _let_end(job: Job, seconds: float, *, grouped: bool) -> None:
    """Let it end by itself, if it does so in time; a member of a group waits to be finalized."""
    await attempt(job.monitor, Command("block-job-cancel", {"device": job.id, "force": False}))
    await job.wait(lambda life: grouped and life.status == "pending", seconds=seconds)
    if job.life.concluded:
        ended = await job.refresh()
        # Nobody is to take it for a copy that was asked for.
        job.life.cancelled |= ended is None or not ended.error
