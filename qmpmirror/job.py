# SPDX-License-Identifier: MIT
"""A block job of QEMU: what it says of itself, and the driver that feeds its `Life` and waits."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors
from qmpmirror.life import IllegalTransitionError, Life
from qmpmirror.monitor import within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from qmpmirror.monitor import Event, Monitor

log = logging.getLogger("qmpmirror.job")

STALL_SECONDS: Final = 600.0
"""How long a job may go without any progress before a wait for it gives up."""

_CHECK_SECONDS: Final = 5.0
PAUSED: Final = frozenset({"paused", "standby"})
"""A user's pause, that of an I/O error, or just a moment in which QEMU drains its nodes."""


@attrs.frozen
class JobStatus:
    """A job of any kind, as ``query-jobs`` describes it.

    Attributes:
        id: its job id.
        type: such as ``mirror`` or ``create``.
        status: QEMU's job status.
        current: units of work done.
        total: units of work in all.
        error: why it failed, in QEMU's words; empty when it did not.
    """

    id: str
    type: str
    status: str
    current: int
    total: int
    error: str

    @classmethod
    def parse(cls, reply: Mapping[str, Any]) -> JobStatus:
        """From an element of the reply of ``query-jobs``."""
        return cls(
            id=reply["id"],
            type=reply["type"],
            status=reply["status"],
            current=reply["current-progress"],
            total=reply["total-progress"],
            error=reply.get("error", ""),
        )


@attrs.frozen
class JobInfo:
    """A block job, as ``query-block-jobs`` describes it.

    Attributes:
        id: its job id.
        type: such as ``mirror``.
        status: QEMU's job status.
        offset: bytes of work done.
        length: bytes of work in all; it grows while the guest writes, and may be 0.
        speed: limit in bytes/s, 0 for none.
        ready: whether the mirroring phase was reached.
        paused: whether the job is paused, by a user or for a moment by QEMU itself.
        io_status: ``ok``, ``failed`` or ``nospace``.
        error: why it failed, in QEMU's words; empty when it did not.
    """

    id: str
    type: str = ""
    status: str = ""
    offset: int = 0
    length: int = 0
    speed: int = 0
    ready: bool = False
    paused: bool = False
    io_status: str = "ok"
    error: str = ""

    @classmethod
    def parse(cls, block_job: Mapping[str, Any]) -> JobInfo:
        """From an element of the reply of ``query-block-jobs``."""
        return cls(
            id=block_job["device"],
            type=block_job["type"],
            status=block_job["status"],
            offset=block_job["offset"],
            length=block_job["len"],
            speed=block_job["speed"],
            ready=block_job["ready"],
            paused=block_job["paused"],
            io_status=block_job["io-status"],
            error=block_job.get("error", ""),
        )


async def block_jobs(monitor: Monitor) -> list[JobInfo]:
    """All block jobs, concluded ones included (``query-block-jobs``)."""
    return [JobInfo.parse(job) for job in await monitor.execute("query-block-jobs")]


@attrs.define(eq=False)
class Job:
    """Watches one job over a monitor: a mirror, or the creation of an image.

    Use it as a context manager, entered before the command that starts the job is sent: events are
    not kept for those who come late.

    Attributes:
        monitor: where the job runs.
        id: its job id.
        life: its state machine.
        io_errors: how many ``BLOCK_JOB_ERROR`` events came.
        error: why it failed, as ``BLOCK_JOB_COMPLETED`` says: ``query-jobs`` says it better, unless
            somebody else has dismissed the job.
    """

    monitor: Monitor
    id: str
    life: Life = attrs.field(factory=Life)
    io_errors: int = attrs.field(default=0, init=False)
    moments: dict[str, float] = attrs.field(factory=dict, init=False)
    error: str = attrs.field(default="", init=False)
    _events: int = attrs.field(default=0, init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _unsubscribe: Callable[[], None] | None = attrs.field(default=None, init=False)

    def __enter__(self) -> Self:
        self._unsubscribe = self.monitor.subscribe(self._take)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching. The job is not touched."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    async def wait(
        self,
        until: Callable[[Life], bool],
        *,
        stall_seconds: float = STALL_SECONDS,
        seconds: float | None = None,
    ) -> bool:
        """Wait until ``until`` holds, or QEMU has ended the job.

        Events wake it at once. Every few seconds the job is also looked at, for its progress and in
        case that somebody else dismissed it. Cancelling this is safe and touches nothing.

        Args:
            until: asked after every change.
            stall_seconds: give up after this long without any progress.
            seconds: return after this long, whatever happened.

        Returns:
            False when ``seconds`` passed, else True.

        Raises:
            ConnectionLost: the connection ended.
            Stalled: there was no progress; the job goes on.
        """
        end = None if seconds is None else time.monotonic() + seconds
        progress: JobStatus | None = None
        moved = time.monotonic()
        while not until(self.life) and not self.life.concluded:
            self._raise_if_lost()
            now = time.monotonic()
            if end is not None and now >= end:
                return False
            # The slow look at the job is for stalls and for a job that somebody else took away.
            pause = min(_CHECK_SECONDS, stall_seconds, _CHECK_SECONDS if end is None else end - now)
            if await self._pause(pause) or self.monitor.loss is not None:
                continue
            latest = await self.refresh()
            if latest != progress or (latest is not None and latest.status in PAUSED):
                progress, moved = latest, time.monotonic()
            elif time.monotonic() - moved >= stall_seconds:
                raise errors.Stalled(
                    f"job {self.id} made no progress for {stall_seconds:g} s",
                    job_id=self.id,
                    hint="it goes on; QEMU may be waiting for its storage",
                )
        return True

    async def refresh(self) -> JobStatus | None:
        """Look at the job (``query-jobs``); None when QEMU has it no more.

        What the events may have missed is made good: somebody else can dismiss a job.
        """
        before = self._events
        for reply in await self.monitor.execute("query-jobs"):
            if reply["id"] == self.id:
                found = JobStatus.parse(reply)
                # An event may have overtaken the reply on its way through this process.
                if found.status != self.life.status and self._events == before:
                    self._resume(found.status)
                return found
        self._resume("null")
        return None

    async def dismiss(self) -> None:
        """Let QEMU forget the concluded job (``job-dismiss``); it is fine if it is gone."""
        try:
            await self.monitor.execute("job-dismiss", {"id": self.id})
        except errors.CommandFailed as error:
            log.debug("%s is gone already: %s", self.id, error.reason)

    async def _pause(self, seconds: float) -> bool:
        """Wait for a change; False when none came in time."""
        try:
            await within(seconds, self._changed.wait())
        except asyncio.TimeoutError:
            return False
        self._changed.clear()
        return True

    def _take(self, event: Event | None) -> None:
        if event is None:
            self.life.lose()
        elif event.name == "JOB_STATUS_CHANGE" and event.data.get("id") == self.id:
            self.moments[event.data["status"]] = event.seconds
            self._events += 1
            self._feed(event.data["status"])
        elif event.data.get("device") != self.id:
            return
        elif event.name == "BLOCK_JOB_CANCELLED":
            self.life.cancelled = True
        elif event.name == "BLOCK_JOB_COMPLETED":
            self.error = event.data.get("error", "")
        elif event.name == "BLOCK_JOB_ERROR":
            self.io_errors += 1
            return  # they come by the ten thousand: nobody needs to wake up for each
        self._changed.set()

    def _feed(self, status: str) -> None:
        if self.life.status == "undefined" and status != "created":
            # Somebody else's job, or one of another process: the first look is still to come.
            self._resume(status)
            return
        try:
            self.life.feed(status)
        except IllegalTransitionError as error:
            # Only a lost event can cause this: carry on from what QEMU says now.
            log.warning("job %s: %s", self.id, error)
            self._resume(status)

    def _resume(self, status: str) -> None:
        if self.life.phase.over:
            return
        resumed = Life.resume(status, self.life.asked, mirrored=self.life.mirrored)
        resumed.cancelled = self.life.cancelled
        resumed.aborting |= self.life.aborting
        self.life = resumed
        self._changed.set()

    def _raise_if_lost(self) -> None:
        if self.monitor.loss is not None:
            raise errors.ConnectionLost(self.monitor.loss.description, job_id=self.id)
