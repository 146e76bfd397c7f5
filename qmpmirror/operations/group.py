# SPDX-License-Identifier: MIT
"""Several disks, one point in time.

All mirrors run with ``auto-finalize=false``. When all are in the mirroring phase, all are told to
end; each then waits, *pending*, with its source drained, so that the guest's writes wait too. Once
all are pending, all are finalized: whatever was acknowledged before is on the copies, nothing after
is. No vCPU is stopped. Until the first finalize everything can be rolled back.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import errors, names
from qmpmirror.life import Ending, Phase
from qmpmirror.operations import blockcopy
from qmpmirror.operations.convergence import converge
from qmpmirror.operations.options import Options
from qmpmirror.operations.plan import plan
from qmpmirror.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from qmpmirror.life import Life
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.operations.handle import Progress
    from qmpmirror.operations.plan import Plan
    from qmpmirror.schema import Schema

MAX_FREEZE: Final = 0.5
"""Seconds that the guest's writes may wait."""

_CALM_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.05


@attrs.frozen
class Cut:
    """When a disk stood still.

    Attributes:
        disk: its name.
        pending: from when on its writes waited, by QEMU's clock, in seconds since the epoch.
        finalized: when they went on.
    """

    disk: str
    pending: float
    finalized: float

    @property
    def freeze(self) -> float:
        """How long its writes waited, in seconds."""
        return max(0.0, self.finalized - self.pending)


@attrs.frozen
class GroupResult:
    """How a group has ended.

    Attributes:
        results: of each disk, in the group's order.
        cuts: of each disk; empty after an abort.
    """

    results: tuple[Result, ...]
    cuts: tuple[Cut, ...] = ()

    @property
    def outcome(self) -> Phase:
        """What became of all of them; ``FAILED`` when they differ."""
        outcomes = {result.outcome for result in self.results}
        return outcomes.pop() if len(outcomes) == 1 else Phase.FAILED

    @property
    def longest_freeze(self) -> float:
        """Seconds from the first write that waited to the last that went on."""
        if not self.cuts:
            return 0.0
        return max(c.finalized for c in self.cuts) - min(c.pending for c in self.cuts)


@attrs.frozen
class Member:
    """A disk of a group.

    Attributes:
        disk: anything that identifies it.
        destination: where its copy goes.
        options: how to copy it.
    """

    disk: str
    destination: str
    options: Options = attrs.field(factory=Options)


@attrs.define(eq=False)
class CopyGroup:
    """Copies of several disks that are ended together.

    Attributes:
        id: the group's id.
        copies: one for each disk.
        max_freeze: seconds that the guest's writes may wait; when they pass, all is rolled back.
        around_cut: an asynchronous context manager to be inside of just around the cut.
    """

    id: str
    copies: Sequence[Copy]
    max_freeze: float = MAX_FREEZE
    around_cut: Callable[[], object] | None = None

    async def progress(self, interval: float = 0.5) -> AsyncIterator[tuple[Progress, ...]]:
        """Report of all, until all are in the mirroring phase or one has ended."""
        last: dict[str, Progress] = {}
        while True:
            for copy in self.copies:
                async for progress in copy.progress(interval):
                    last[copy.id] = progress
                    break
            if len(last) == len(self.copies):
                yield tuple(last.values())
            if all(copy.phase is not Phase.COPYING for copy in self.copies):
                return
            if any(copy.job.life.concluded for copy in self.copies):
                return
            await asyncio.sleep(interval)

    async def ready(self, *, seconds: float | None = None) -> bool:
        """Wait until all are in the mirroring phase; raises as `Copy.ready`.

        When one fails, the others are aborted.

        Args:
            seconds: return False after this long; the copies go on.
        """
        try:
            waits = [copy.ready(seconds=seconds) for copy in self.copies]
            return all(await _together(waits))
        except errors.JobError:
            await self.roll_back()
            raise

    async def pivot(self) -> GroupResult:
        """Switch the guest to all copies at one instant.

        Cancelling this before the first is finalized rolls all back.

        Raises:
            NotReady: EndingAlreadyAsked: as `Copy.pivot`; nothing has changed.
            DeadlineExceeded: the guest's writes would have waited too long; all was rolled back.
            JobFailed: one failed; all were rolled back.
            ConnectionLost: the connection ended; the watchdog rolls back or finalizes.
        """
        return await self._cut(Ending.PIVOT)

    async def finish(self) -> GroupResult:
        """Keep all copies as they are at one instant; raises as `pivot`."""
        return await self._cut(Ending.FINISH)

    async def abort(self) -> GroupResult:
        """End all copies at once; they are worthless, and files that were created are removed."""
        return GroupResult(await self.roll_back())

    async def roll_back(self) -> tuple[Result, ...]:
        """Cancel all, also those that wait to be finalized: each guest disk stays as it was."""
        results = []
        for copy in self.copies:
            if copy.result is None:
                try:
                    results.append(await copy.roll_back())
                except errors.JobFailed:
                    continue  # it is what all are rolled back for
        return tuple(results)

    async def _cut(self, ending: Ending) -> GroupResult:
        for copy in self.copies:
            await copy.prepare(ending)
        await self._come_close()
        async with AsyncExitStack() as stack:
            monitor = self.copies[0].monitor
            address = monitor.address if monitor.owned else ""
            await stack.enter_async_context(Watchdog(address, self.id))
            if self.around_cut is not None:
                await stack.enter_async_context(self.around_cut())  # type: ignore[arg-type]
            try:
                await _together([copy.send(ending) for copy in self.copies])
                await self._all_pending()
            except BaseException:
                await self.roll_back()
                raise
            await self._finalize()
        results = tuple([await copy.conclude() for copy in self.copies])
        return GroupResult(results, tuple(map(_cut_of, self.copies)))

    async def _come_close(self) -> None:
        """Bring all copies as near to their disks as possible, so that the cut is short."""
        end = time.monotonic() + _CALM_SECONDS
        for copy in self.copies:
            await converge(copy)
        while time.monotonic() < end:
            infos = [await copy.info() for copy in self.copies]
            if all(info.offset == info.length for info in infos):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _all_pending(self) -> None:
        waits = {asyncio.ensure_future(copy.job.wait(_pending)) for copy in self.copies}
        try:
            _, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if rest:
                _, rest = await asyncio.wait(rest, timeout=self.max_freeze)
        finally:
            for wait in waits:
                wait.cancel()
        failed = [copy for copy in self.copies if copy.job.life.concluded]
        if failed:
            reason = (await failed[0].error()) or "somebody else ended it"
            raise errors.JobFailed(
                f"the copy of {failed[0].disk.name} failed: {reason}; all were rolled back",
                job_id=failed[0].id,
                reason=reason,
                authoritative=failed[0].disk.path,
            )
        if rest:
            raise errors.DeadlineExceeded(
                f"the guest's writes would have waited more than {self.max_freeze:g} s;"
                " all copies were rolled back",
                hint="let the guest write less, or allow a longer freeze",
            )

    async def _finalize(self) -> None:
        """From the first of these on there is no way back; so the others are tried in any case."""
        ids = [copy.id for copy in self.copies]
        monitor = self.copies[0].monitor
        commands = (monitor.execute("job-finalize", {"id": job}) for job in ids)
        replies = await asyncio.gather(*commands, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, errors.ConnectionLost):
                raise reply
        for copy in self.copies:
            await copy.job.wait(lambda life: life.concluded)


async def start(
    monitor: Monitor, schema: Schema, members: Iterable[Member], *, max_freeze: float = MAX_FREEZE
) -> CopyGroup:
    """Plan all, then start all; see `Machine.blockcopy_group`."""
    if max_freeze <= 0:
        raise errors.UsageError(f"max-freeze {max_freeze:g} s is no time at all")
    group = names.new_group()
    plans = []
    for number, member in enumerate(members):
        run = names.member_run(group, number)
        plans.append(
            await plan(monitor, schema, member.disk, member.destination, member.options, member=run)
        )
    _check_distinct(plans)
    copies: list[Copy] = []
    try:
        for each in plans:
            # One by one: those before a failure must be known.
            copies.append(await blockcopy.start(monitor, schema, each))  # noqa: PERF401
    except BaseException:
        await CopyGroup(group, copies).roll_back()
        raise
    return CopyGroup(group, copies, max_freeze)


def _check_distinct(plans: Sequence[Plan]) -> None:
    if not plans:
        raise errors.UsageError("no disk was given")
    disks = [plan.disk.node for plan in plans]
    for place, made in enumerate(plans):
        if made.disk.node in disks[:place]:
            raise errors.UsageError(f"disk {made.disk.name!r} was given twice")
        if made.destination.text in (plan.destination.text for plan in plans[:place]):
            raise errors.UsageError(f"destination {made.destination.text} was given twice")


async def _together(waits: Sequence[Awaitable[object]]) -> list[object]:
    """Wait for all; the first error ends the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _pending(life: Life) -> bool:
    return life.status == "pending"


def _cut_of(copy: Copy) -> Cut:
    moments = copy.job.moments
    return Cut(copy.disk.name, moments.get("pending", 0.0), moments.get("concluded", 0.0))
