# SPDX-License-Identifier: MIT
"""What can be done with any block job, whoever has started it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors
from qmpmirror.job import STALL_SECONDS, Job, JobInfo, block_jobs
from qmpmirror.life import Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.disks import Disk
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema

_SMOOTHING: Final = 0.3
_MIRRORED: Final = frozenset(
    {Phase.MIRRORING, Phase.PIVOTING, Phase.FINISHING, Phase.PIVOTED, Phase.FINISHED}
)


@attrs.frozen
class Progress:
    """How far a copy is.

    Attributes:
        phase: where it is in its life.
        offset: bytes of work done.
        length: bytes of work in all; it grows while the guest writes, and may be 0.
        rate: bytes/s, smoothed; 0 when not known yet.
        eta: seconds until the mirroring phase at this rate; None when not known.
        io_status: ``ok``, or ``nospace`` or ``failed`` when an I/O error has stopped it.
    """

    phase: Phase
    offset: int
    length: int
    rate: float
    eta: float | None
    io_status: str = "ok"

    @property
    def percent(self) -> float:
        """0 to 100; 100 only in the mirroring phase."""
        if self.phase in _MIRRORED:
            return 100.0
        if not self.length:
            return 0.0
        return min(99.99, int(10000 * self.offset / self.length) / 100)

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = attrs.asdict(self) | {"phase": self.phase.value, "percent": self.percent}
        return plain | {"rate": round(self.rate)}


@attrs.define
class Pace:
    """How fast something goes on, from one look to the next."""

    _rate: float = 0.0
    _last: tuple[float, int] | None = None

    def at(self, offset: int, length: int) -> tuple[float, float | None]:
        """The rate in bytes/s, smoothed, and the seconds that are left at this rate."""
        now = time.monotonic()
        # A job begins with a burst, which no limit holds back: it says nothing of the rest.
        before, there = self._last or (now, offset)
        elapsed, done = now - before, offset - there
        if done and elapsed > 0:
            newest = done / elapsed
            smoothed = self._rate + _SMOOTHING * (newest - self._rate)
            self._rate = smoothed if self._rate else newest
        self._last = (now, offset)
        return self._rate, (length - offset) / self._rate if self._rate > 0 else None


@attrs.define(eq=False, kw_only=True)
class BlockJob:
    """A block job on a disk.

    Attributes:
        monitor: the QEMU.
        schema: what it can do.
        job: the watched job.
        disk: the disk.
    """

    monitor: Monitor
    schema: Schema
    job: Job
    disk: Disk

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @property
    def phase(self) -> Phase:
        """Where the copy is in its life, as far as events have told."""
        return self.job.life.phase

    async def info(self) -> JobInfo:
        """Ask QEMU about the job (``query-block-jobs``).

        Raises:
            JobNotFound: QEMU has it no more.
        """
        for info in await block_jobs(self.monitor):
            if info.id == self.id:
                return info
        raise errors.JobNotFound(f"QEMU has no block job {self.id}", job_id=self.id)

    async def progress(
        self, interval: float = 0.5, *, until_mirroring: bool = True
    ) -> AsyncIterator[Progress]:
        """Report until the mirroring phase, or until the job has ended.

        Leaving the loop, or cancelling it, touches nothing.

        Args:
            interval: seconds between two reports; a change of phase is reported at once.
            until_mirroring: whether to stop there.

        Raises:
            ConnectionLost: the connection ended.
        """
        pace = Pace()
        while not self.job.life.concluded:
            try:
                info = await self.info()
            except errors.JobNotFound:
                return
            rate, eta = pace.at(info.offset, info.length)
            phase = self.phase
            yield Progress(phase, info.offset, info.length, rate, eta, info.io_status)
            if until_mirroring and phase is not Phase.COPYING:
                return
            await self.job.wait(lambda life: life.phase is not phase, seconds=interval)  # noqa: B023

    async def error(self) -> str:
        """The job's error in QEMU's words; empty when it has none, or is gone (``query-jobs``)."""
        found = await self.job.refresh()
        return found.error if found else ""

    async def set_bandwidth(self, bandwidth: int) -> None:
        """Change the limit (``block-job-set-speed``) to bytes/s; 0 for none.

        QEMU does not apply it while a mirror that has nothing to do follows the guest's writes.
        """
        await self.monitor.execute("block-job-set-speed", {"device": self.id, "speed": bandwidth})

    async def pause(self) -> None:
        """Pause it (``job-pause``), after the requests that are under way."""
        await self.monitor.execute("job-pause", {"id": self.id})

    async def resume(self) -> None:
        """Let it go on (``job-resume``), also after an I/O error that stopped it."""
        await self.monitor.execute("job-resume", {"id": self.id})

    async def cancel(
        self, *, force: bool = False, wait: bool = True, stall_seconds: float = STALL_SECONDS
    ) -> None:
        """End somebody else's job (``block-job-cancel``); its owner dismisses it and tidies up.

        Args:
            force: at once, whatever the phase.
            wait: whether to wait for the end.
            stall_seconds: give up waiting after this long without any progress.
        """
        await self.monitor.execute("block-job-cancel", {"device": self.id, "force": force})
        if wait:
            await self.job.wait(lambda life: life.concluded, stall_seconds=stall_seconds)
