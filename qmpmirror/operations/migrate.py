# SPDX-License-Identifier: MIT
"""migrate: a guest moves to a second QEMU that does not share its storage.

The destination offers its disks by NBD and the source mirrors to them. When all disks mirror, the
memory follows. Just before the switch, with the guest standing still, the mirrors are ended, so the
disks are those of the same instant as the memory. Until ``migrate-continue`` any failure leaves the
guest running at the source. From then on the outcome is read back from both; the destination does
not let the guest run before the source is known to have let it go.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors
from qmpmirror.job import STALL_SECONDS
from qmpmirror.monitor import within
from qmpmirror.operations import migration_checks
from qmpmirror.operations.endpoints import choose
from qmpmirror.operations.incoming import Incoming
from qmpmirror.operations.migration import MigrationProgress, MigrationResult
from qmpmirror.operations.migration_plan import MOVING
from qmpmirror.operations.outgoing import LOOK_SECONDS, Outgoing, let_run
from qmpmirror.operations.together import see_through

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from qmpmirror.monitor import Event, Monitor
    from qmpmirror.operations.endpoints import Endpoints
    from qmpmirror.operations.migration import MigrateOptions
    from qmpmirror.operations.migration_plan import MigrationPlan
    from qmpmirror.schema import Schema

_ARRIVAL_SECONDS: Final = 60.0
"""How long the destination may take to say that all is there, after the source has said so."""


async def migrate(
    source: tuple[Monitor, Schema],
    destination: tuple[Monitor, Schema],
    options: MigrateOptions,
) -> MigrationResult:
    """Move a guest; see `Machine.migrate`."""
    plan = await migration_checks.plan(source, destination, options)
    endpoints = choose(
        plan.group,
        source[0],
        destination[0],
        options.disks_uri,
        options.migrate_uri,
        tls=bool(options.tls_creds),
    )
    try:
        return await _Migration.of(plan, endpoints).run()
    finally:
        endpoints.close()


@attrs.define(eq=False)
class _Migration:
    """One migration, from the first change to the last."""

    plan: MigrationPlan
    source: Outgoing
    destination: Incoming
    _side: str = attrs.field(default="destination", init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _suspend_at: float | None = attrs.field(default=None, init=False)
    _disks: tuple[int, int] = attrs.field(default=(0, 0), init=False)
    _moved: tuple[tuple[int, ...], float] = attrs.field(default=((), 0.0), init=False)
    _last: tuple[str, float, int] = attrs.field(default=("", 0.0, 0), init=False)

    @classmethod
    def of(cls, plan: MigrationPlan, endpoints: Endpoints) -> _Migration:
        """A migration that has not begun."""
        return cls(plan, Outgoing(plan, endpoints), Incoming(plan, endpoints))

    async def run(self) -> MigrationResult:
        """Do it; anything that goes wrong before the switch is taken back."""
        if (seconds := self.plan.options.suspend_after) is not None:
            self._suspend_at = time.monotonic() + seconds
        unsubscribe = [
            side.monitor.subscribe(self._notice) for side in (self.source, self.destination)
        ]
        try:
            try:
                await self._come_close()
            except BaseException as error:
                explained = self._explained(error, await see_through(self._take_back()))
                if explained is error:
                    raise
                raise explained from error
            return await self._see_switch_through()
        finally:
            for end in unsubscribe:
                end()

    async def _come_close(self) -> None:
        """Everything up to the point of no return."""
        await self.destination.offer_disks()
        self._side = "source"
        await self.source.start_mirrors()
        await self._until(self._all_mirror)
        if self.plan.options.synchronous_writes:
            if not self.plan.blocking_from_start:
                await self.source.make_synchronous()
            await self._until(self.source.are_synchronous)
        self._side = "destination"
        await self.destination.listen()
        self._side = "source"
        await self.source.send_memory()
        await self._until(self._stands_still)
        await self._unless_lost(self.source.end_mirrors())

    async def _all_mirror(self) -> bool:
        return all(job.life.mirrored for job in self.source.jobs)

    async def _stands_still(self) -> bool:
        await self.source.look()
        if self.source.status not in MOVING:
            raise _failed(self.source.migration)
        return self.source.status == "pre-switchover"

    async def _until(self, holds: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Wait until something holds; looked at after each event, and now and then anyway."""
        self._moved = ((), time.monotonic())
        while True:
            done = await holds()
            await self._check()
            await self._report()
            if done:
                return
            await self._pause()

    async def _unless_lost(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something at the source, but give up when the destination is lost."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({task, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._changed.clear()
                if not task.done():
                    self._raise_if_lost()
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _check(self) -> None:
        if self.destination.monitor.loss is not None and self.source.migration:
            # It ends when the migration is cancelled: then that is the reason.
            await self.source.look()
            if self.source.status in {"cancelling", "cancelled"}:
                raise _failed(self.source.migration)
        self._raise_if_lost()
        for job in self.source.jobs:
            if job.life.concluded:
                reason = await self.source.error_of(job) or "somebody else has ended its job"
                raise errors.MigrationFailed(
                    f"a disk did not get to the destination: {reason}",
                    reason=reason,
                    runs_on="source",
                )

    def _raise_if_lost(self) -> None:
        if self.source.monitor.loss is not None:
            raise errors.ConnectionLost(self.source.monitor.loss.description)
        if self.destination.monitor.loss is not None:
            reason = self.destination.monitor.loss.description
            raise errors.MigrationFailed(
                f"the destination was lost: {reason}", reason=reason, runs_on="source"
            )

    async def _report(self) -> None:
        """Tell how far it is; give up if it does not move at all; suspend it in time."""
        infos = await self.source.infos()
        self._disks = sum(info.offset for info in infos), sum(info.length for info in infos)
        memory = self.source.migration.get("ram", {})
        sent, remaining = memory.get("transferred", 0), memory.get("remaining", 0)
        total = memory.get("total", self.plan.source.memory)
        now = time.monotonic()
        if (state := (*self._disks, sent, remaining)) != self._moved[0]:
            self._moved = state, now
        elif now - self._moved[1] > STALL_SECONDS:
            raise errors.Stalled("the migration made no progress", job_id=self.source.jobs[0].id)
        if self._suspend_at is not None and now >= self._suspend_at and self.source.jobs:
            self._suspend_at = None
            await self.source.suspend()
        if (report := self.plan.options.report) is not None:
            arrived = total - remaining if memory else 0
            report(self._progress(arrived, total, sent, now))

    def _progress(self, arrived: int, total: int, sent: int, now: float) -> MigrationProgress:
        phase = "memory" if self.source.migration else "disks"
        counted = sent if self.source.migration else self._disks[0]
        before, then, had = self._last
        rate = max(0.0, (counted - had) / (now - then)) if before == phase and now > then else 0.0
        self._last = phase, now, counted
        missing = total - arrived if phase == "memory" else self._disks[1] - self._disks[0]
        return MigrationProgress(
            phase=phase,
            offset=self._disks[0] + arrived,
            length=self._disks[1] + total,
            rate=rate,
            eta=missing / rate if rate else None,
        )

    def _notice(self, _: Event | None) -> None:
        self._changed.set()

    async def _take_back(self) -> tuple[str, ...]:
        left: tuple[str, ...] = ()
        if self.source.monitor.loss is None:
            left = await self.source.take_back()
        return left + await self.destination.take_back()

    def _explained(self, error: BaseException, left: tuple[str, ...]) -> BaseException:
        """The error, with what was left, and what is to be known of both sides."""
        if isinstance(error, errors.CommandFailed):
            reason = error.reason
            what = f"the {self._side} refused {error.command}: {reason}"
            lost = self.destination.has_ended or self.destination.monitor.loss is not None
            if lost or self.destination.doomed:
                what = f"the destination was lost: {reason}" if lost else what
                error = errors.MigrationFailed(what, reason=reason, runs_on="source")
            else:
                error = errors.Refused(what)
        if isinstance(error, errors.ConnectionLost):
            error.hint = (
                "the guest runs on at the source; qmpmirror recover on both sides puts away what"
                " the migration has left"
            )
        if isinstance(error, errors.Error):
            error.left += left
        return error

    async def _see_switch_through(self) -> MigrationResult:
        """Switch, whatever comes; an error tells more than a cancellation that came too late."""
        switching = asyncio.ensure_future(self._switch())
        try:
            await see_through(_settled(switching))
        except asyncio.CancelledError:
            if not switching.cancelled() and switching.exception() is None:
                raise
        return switching.result()

    async def _switch(self) -> MigrationResult:
        """From here on there is no way back: the outcome is read from both QEMUs."""
        await self._continue()
        left = await self.source.forget()
        await self._arrived()
        left += await self.destination.close_offers()
        if self.destination.monitor.loss is not None:
            await self._bring_back(self.destination.monitor.loss.description)
        running = self.plan.running and await self._run_guest()
        left += await self.destination.forget()
        return self._result(left, running=running)

    async def _run_guest(self) -> bool:
        try:
            return await self.destination.run_guest()
        except errors.ConnectionLost as error:
            raise errors.MigrationFailed(
                f"the destination was lost when the guest was to run there: {error.description}",
                reason=error.description,
                runs_on="unknown",
                hint="the images of the destination hold all that it has written: do not let it run"
                " on at the source",
            ) from error

    async def _continue(self) -> None:
        source = self.source
        try:
            await source.monitor.execute("migrate-continue", {"state": "pre-switchover"})
            while not await source.is_over():
                await self._pause()
        except errors.ConnectionLost as error:
            error.hint = (
                "the guest was being switched: it runs nowhere, or at the source; see qmpmirror"
                " recover there, and then at the destination"
            )
            raise
        except errors.CommandFailed as error:
            source.migration = {"error-desc": error.reason}
        if source.status != "completed":
            failure = _failed(source.migration)
            failure.left = await self._take_back()
            raise failure

    async def _pause(self) -> None:
        """Wait for an event, but not for long."""
        with suppress(asyncio.TimeoutError):
            await within(LOOK_SECONDS, self._changed.wait())
        self._changed.clear()

    async def _arrived(self) -> None:
        """Wait until the destination has everything.

        Raises:
            MigrationFailed: it has ended, or does not come to its end.
        """
        monitor, end = self.destination.monitor, time.monotonic() + _ARRIVAL_SECONDS
        reason = ""
        while not reason:
            try:
                if (await monitor.execute("query-status"))["status"] != "inmigrate":
                    return
            except errors.ConnectionLost as error:
                reason = error.description
            if time.monotonic() > end:
                reason = f"it does not take the guest within {_ARRIVAL_SECONDS:g} s"
            await self._pause()
        await self._bring_back(reason)

    async def _bring_back(self, reason: str) -> None:
        """The destination is lost, and has never let the guest run: the source has all of it."""
        ended = await self.destination.is_gone()
        runs = False
        if ended and self.plan.running:
            runs = await let_run(self.source.monitor, running=True)
        on = "source" if runs or (ended and not self.plan.running) else "nowhere"
        raise errors.MigrationFailed(
            f"the destination was lost when it had the guest: {reason}",
            reason=reason,
            runs_on=on,
            hint=""
            if on == "source"
            else "make sure that the destination does not run it; then cont lets it run on at the"
            " source, which has all of it",
        )

    def _result(self, left: tuple[str, ...], *, running: bool) -> MigrationResult:
        moves, told = self.plan.moves, self.source.migration
        result = MigrationResult(
            disks=tuple(move.source.name for move in moves),
            images=tuple(move.destination.path for move in moves),
            running=running,
            downtime=told.get("downtime", 0),
            total_time=told.get("total-time", 0),
            memory=told.get("ram", {}).get("transferred", 0),
            notes=self.plan.notes,
            left=left,
        )
        if (report := self.plan.options.report) is not None:
            done = self._disks[1] + self.plan.source.memory
            report(MigrationProgress("done", done, done, result=result))
        return result


async def _settled(task: asyncio.Task[MigrationResult]) -> None:
    await asyncio.wait({task})


def _failed(migration: Mapping[str, Any]) -> errors.MigrationFailed:
    reason = migration.get("error-desc", "")
    if migration.get("status") in {"cancelling", "cancelled"}:
        reason = "somebody else cancelled it"
    reason = reason or "QEMU does not say why; see what the destination's QEMU has printed"
    return errors.MigrationFailed(
        f"the memory did not get to the destination: {reason}", reason=reason, runs_on="source"
    )
