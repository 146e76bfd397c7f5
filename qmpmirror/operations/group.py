# SPDX-License-Identifier: MIT
"""Several disks, one point in time.

All mirrors run with ``auto-finalize=false``. When all are in the mirroring phase, all are told to
end; each then waits, *pending*, with its source drained, so that the guest's writes wait too. Once
all are pending, all are finalized: whatever was acknowledged before is on the copies, nothing after
is. No vCPU is stopped. Until the first finalize everything can be rolled back.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import errors, names
from qmpmirror.life import Ending, Phase
from qmpmirror.names import Mark
from qmpmirror.operations import blockcopy, marks
from qmpmirror.operations.cancelling import cancel_by_force
from qmpmirror.operations.convergence import converge
from qmpmirror.operations.cut import Cut, GroupResult, failed_result, failure_of
from qmpmirror.operations.options import Options
from qmpmirror.operations.plan import plan
from qmpmirror.operations.together import see_through, together
from qmpmirror.steps import Command, attempt
from qmpmirror.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from qmpmirror.life import Life
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.operations.handle import Progress
    from qmpmirror.operations.plan import Plan
    from qmpmirror.schema import Schema

__all__ = ["MAX_FREEZE", "CopyGroup", "Cut", "GroupResult", "Member", "start"]

MAX_FREEZE: Final = 0.5
"""Seconds that the guest's writes may wait."""

QUIESCED_SECONDS: Final = 10.0
"""How long the guest may be held by ``around_cut`` before the first disk stands still."""

_CALM_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.05
_GOOD: Final = frozenset({Phase.PIVOTED, Phase.FINISHED})


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
        notes: what the user must know, one sentence each.
        around_cut: an asynchronous context manager to be inside of just around the cut.
        result: how it has ended; None while it goes on.
    """

    id: str
    copies: Sequence[Copy]
    max_freeze: float = MAX_FREEZE
    notes: tuple[str, ...] = ()
    around_cut: Callable[[], AbstractAsyncContextManager[object]] | None = None
    result: GroupResult | None = attrs.field(default=None, init=False)
    _made: bool = attrs.field(default=False, init=False)
    _failures: dict[str, errors.JobFailed] = attrs.field(factory=dict, init=False)

    async def progress(self, interval: float = 0.5) -> AsyncIterator[tuple[Progress, ...]]:
        """Report of all, until all are in the mirroring phase or one has ended."""
        streams = [copy.progress(interval, until_mirroring=False) for copy in self.copies]
        while True:
            each = await asyncio.gather(*(anext(stream, None) for stream in streams))
            known = tuple(progress for progress in each if progress is not None)
            if len(known) < len(each):
                return
            yield known
            if all(progress.phase is not Phase.COPYING for progress in known):
                return

    async def ready(self, *, seconds: float | None = None) -> bool:
        """Wait until all are in the mirroring phase; raises as `Copy.ready`.

        When one fails, all are rolled back. Cancelling this is safe; the copies go on.

        Args:
            seconds: return False after this long; the copies go on.
        """
        try:
            return all(await together(self._ready(copy, seconds) for copy in self.copies))
        except errors.JobFailed as failure:
            result = await see_through(self.roll_back())
            copy = next(copy for copy in self.copies if copy.id == failure.job_id)
            raise failure_of(copy, failure.reason, result) from failure

    async def pivot(self) -> GroupResult:
        """Switch the guest to all copies at one instant.

        Cancelling this before the first is finalized rolls all back; after that, it is seen
        through, and ``result`` tells how it has ended.

        Returns:
            What became of each. Only if QEMU refuses to finalize one, or somebody else cancels it
            in the few milliseconds before, do they differ: then the outcome is ``FAILED``.

        Raises:
            NotReady: EndingAlreadyAsked: JobError: as `Copy.pivot`; nothing has changed.
            DeadlineExceeded: the guest's writes would have waited too long; all was rolled back.
            JobFailed: one failed; all were rolled back.
            ConnectionLost: the connection ended; the watchdog rolls back or finalizes.
        """
        return await self._cut(Ending.PIVOT)

    async def finish(self) -> GroupResult:
        """Keep all copies as they are at one instant; as `pivot` in all else."""
        return await self._cut(Ending.FINISH)

    async def abort(self) -> GroupResult:
        """End all copies at once; they are worthless, and files that were created are removed."""
        return await self.roll_back()

    async def roll_back(self) -> GroupResult:
        """Cancel all, also those that wait to be finalized: each guest disk stays as it was."""
        await self._cancel()
        return await self._conclude()

    async def _ready(self, copy: Copy, seconds: float | None) -> bool:
        try:
            return await copy.ready(seconds=seconds)
        except errors.JobFailed as failure:
            self._failures[copy.id] = failure
            raise

    async def _cut(self, ending: Ending) -> GroupResult:
        refusal: errors.Error | None = None
        try:
            await self._raise_if_ended()
            refusal = await self._prepare(ending)
            if refusal is None:
                await self._come_close()
                await self._at_one_instant(ending)
        except BaseException as error:
            if isinstance(error, (errors.ConnectionLost, errors.CommandTimeout)):
                raise
            if not self._made:
                result = await see_through(self.roll_back())
                if isinstance(error, errors.Error):
                    error.left += result.left_over
                raise
            result = await see_through(self._conclude())
            if not isinstance(error, errors.Error):
                raise
            self.result = attrs.evolve(result, left=(error.description,))
            return self.result
        if refusal is not None:
            raise refusal
        return await see_through(self._conclude())

    async def _prepare(self, ending: Ending) -> errors.Error | None:
        """Prepare all, or none; return what keeps one from it."""
        for number, copy in enumerate(self.copies):
            try:
                await copy.prepare(ending)
            except (errors.JobError, errors.CommandFailed) as error:
                for prepared in self.copies[:number]:
                    where = prepared.target_node, prepared.name.run
                    await attempt(prepared.monitor, marks.remove(*where, Mark(ending.value)))
                await self._raise_if_ended(look=True)
                return error
        return None

    async def _come_close(self) -> None:
        """Bring all copies as near to their disks as possible, so that the cut is short."""
        end = time.monotonic() + _CALM_SECONDS
        for copy in self.copies:
            await converge(copy)
        while time.monotonic() < end:
            await self._raise_if_ended()
            infos = [await copy.info() for copy in self.copies]
            if all(info.offset == info.length for info in infos):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _at_one_instant(self, ending: Ending) -> None:
        monitor = self.copies[0].monitor
        async with AsyncExitStack() as stack:
            address = monitor.address if monitor.owned else ""
            await stack.enter_async_context(Watchdog(address, self.id))
            if self.around_cut is not None:
                await stack.enter_async_context(self.around_cut())
            try:
                await together(self._send(copy, ending) for copy in self.copies)
                await self._all_pending()
            except BaseException:
                # Before the guest agent thaws: that may need the disks.
                await see_through(self._cancel())
                raise
            self._made = True
            await see_through(self._finalize())

    async def _send(self, copy: Copy, ending: Ending) -> None:
        try:
            await copy.send(ending)
        except (errors.JobError, errors.CommandFailed) as error:
            await self._raise_if_ended(look=True)
            raise failure_of(copy, error.description) from error

    async def _all_pending(self) -> None:
        waits = {asyncio.ensure_future(copy.job.wait(_is_pending)) for copy in self.copies}
        seconds = None if self.around_cut is None else QUIESCED_SECONDS
        end = None if seconds is None else time.monotonic() + seconds
        rest, stand_still = waits, False
        try:
            while rest:
                pause = None if end is None else max(0.0, end - time.monotonic())
                done, rest = await asyncio.wait(
                    rest, timeout=pause, return_when=asyncio.FIRST_COMPLETED
                )
                for wait in done:
                    wait.result()
                await self._raise_if_ended()
                if not done:
                    raise self._too_long(stand_still=stand_still)
                if not stand_still:
                    end, stand_still = time.monotonic() + self.max_freeze, True
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _too_long(self, *, stand_still: bool) -> errors.DeadlineExceeded:
        if not stand_still:
            return errors.DeadlineExceeded(
                f"no copy came to its end within {QUIESCED_SECONDS:g} s of a quiesced guest;"
                " all copies were rolled back",
                hint="the destination may be too slow",
            )
        return errors.DeadlineExceeded(
            f"the guest's writes would have waited more than {self.max_freeze * 1000:g} ms;"
            " all copies were rolled back",
            hint="let the guest write less, or allow a longer freeze",
        )

    async def _raise_if_ended(self, *, look: bool = False) -> None:
        for copy in self.copies:
            if look:
                await copy.job.refresh()
            if copy.job.life.aborting:
                await copy.job.wait(_is_concluded)
            if copy.job.life.concluded:
                raise failure_of(copy, await copy.error() or "somebody else ended it")

    async def _cancel(self) -> None:
        """Tell all at once: no disk stands still until it is another's turn."""
        running = [copy for copy in self.copies if not copy.job.life.concluded]
        await asyncio.gather(
            *(cancel_by_force(copy.job, synchronous=copy.synchronous) for copy in running)
        )
        for copy in running:
            await copy.job.wait(_is_concluded)

    async def _finalize(self) -> None:
        """From the first of these on there is no way back; so the others are tried in any case."""
        replies = await asyncio.gather(*map(_finalize, self.copies), return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        for copy in self.copies:
            await copy.job.wait(_is_concluded)

    async def _conclude(self) -> GroupResult:
        """Put all away, whatever has become of each."""
        results = [await self._result_of(copy) for copy in self.copies]
        good = [
            copy
            for copy, result in zip(self.copies, results, strict=True)
            if result.outcome in _GOOD and "pending" in copy.job.moments
        ]
        self.result = GroupResult(tuple(results), tuple(map(_cut_of, good)))
        return self.result

    async def _result_of(self, copy: Copy) -> Result:
        failure = self._failures.get(copy.id)
        if failure is None or copy.result is not None:
            try:
                return await copy.conclude()
            except errors.JobFailed as error:
                self._failures[copy.id] = failure = error
        return failed_result(copy, failure)


async def start(
    monitor: Monitor, schema: Schema, members: Iterable[Member], *, max_freeze: float = MAX_FREEZE
) -> CopyGroup:
    """Plan all, then start all; see `Machine.blockcopy_group`."""
    if max_freeze <= 0:
        raise errors.UsageError(f"max-freeze {max_freeze:g} s is no time at all")
    group = names.new_group()
    plans = []
    members = list(members)
    for number, member in enumerate(members, 1):
        # Number 0 is started last: when it is there, so are all.
        run = names.member_run(group, len(members) - number)
        plans.append(
            await plan(monitor, schema, member.disk, member.destination, member.options, member=run)
        )
    _check_distinct(plans)
    copies: list[Copy] = []
    try:
        for each in plans:
            # One by one: those before a failure must be known.
            copies.append(await blockcopy.start(monitor, schema, each))  # noqa: PERF401
    except BaseException as error:
        if isinstance(error, errors.ConnectionLost):
            raise
        result = await see_through(CopyGroup(group, copies).roll_back())
        if isinstance(error, errors.Error):
            error.left += result.left_over
        raise
    notes = tuple(f"{plan.disk.name}: {note}" for plan in plans for note in plan.notes)
    return CopyGroup(group, copies, max_freeze, notes)


def _check_distinct(plans: Sequence[Plan]) -> None:
    if not plans:
        raise errors.UsageError("no disk was given")
    disks = [plan.disk.node for plan in plans]
    places = [_place(plan) for plan in plans]
    for number, made in enumerate(plans):
        if made.disk.node in disks[:number]:
            raise errors.UsageError(f"disk {made.disk.name!r} was given twice")
        if places[number] in places[:number]:
            raise errors.UsageError(f"destination {made.destination.text} was given twice")


def _place(plan: Plan) -> str:
    text = plan.destination.text
    return os.path.realpath(text) if plan.destination.is_local else text


async def _finalize(copy: Copy) -> None:
    """Let a disk go on; if QEMU refuses twice, by cancelling its copy."""
    finalize = Command("job-finalize", {"id": copy.id})
    if not await attempt(copy.monitor, finalize):
        return
    reason = await attempt(copy.monitor, finalize)
    if reason:
        copy.notes.append(f"QEMU refused to finalize it: {reason}")
        await attempt(copy.monitor, Command("job-cancel", {"id": copy.id}))


def _cut_of(copy: Copy) -> Cut:
    moments = copy.job.moments
    return Cut(copy.disk.name, moments["pending"], moments["concluded"])


def _is_pending(life: Life) -> bool:
    return life.status == "pending"


def _is_concluded(life: Life) -> bool:
    return life.concluded
