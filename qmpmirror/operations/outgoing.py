# SPDX-License-Identifier: MIT
"""The source of a migration: its disks are mirrored to the destination, then the memory follows."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import errors
from qmpmirror.job import Job, block_jobs
from qmpmirror.opening import OpenImage
from qmpmirror.operations.migration_plan import (
    MOVING,
    bitmap_mapping,
    nbd_options,
    switch_capabilities,
    tls_object,
)
from qmpmirror.operations.safe_start import stop_marks
from qmpmirror.operations.starting import start_job
from qmpmirror.steps import Command, Execute, attempt
from qmpmirror.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.job import JobInfo
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.endpoints import Endpoints
    from qmpmirror.operations.migration_plan import DiskMove, MigrationPlan, Side

LOOK_SECONDS = 0.5
_PAUSE_SECONDS = 0.02
_SETUP_SECONDS = 5.0
_CANCEL_SECONDS = 1.0


@attrs.define(eq=False)
class Outgoing:
    """The source.

    Attributes:
        plan: the plan.
        endpoints: where both sides meet.
        undo: what leaves it as it was, with the guest running on.
        jobs: the mirrors.
        suspended: the node that says that we have stopped the vCPUs; it is deleted last.
        migration: the last reply of ``query-migrate``.
    """

    plan: MigrationPlan
    endpoints: Endpoints
    undo: Undo = attrs.field(factory=Undo, init=False)
    jobs: list[Job] = attrs.field(factory=list, init=False)
    suspended: str = attrs.field(default="", init=False)
    migration: Mapping[str, Any] = attrs.field(factory=dict, init=False)

    @property
    def _side(self) -> Side:
        return self.plan.source

    @property
    def monitor(self) -> Monitor:
        """The connection."""
        return self._side.monitor

    @property
    def status(self) -> str:
        """The state of the memory's migration, as last seen."""
        return str(self.migration.get("status", ""))

    async def start_mirrors(self) -> None:
        """Connect to the destination's exports, and start a mirror to each."""
        for move in self.plan.moves:
            if self.plan.options.tls_creds:
                made = tls_object(
                    self._side.schema, move.tls, self.plan.options.tls_creds, "client"
                )
                await self._step(made, Command("object-del", {"id": move.tls}))
            assert move.source.image is not None  # noqa: S101 - it was checked
            step = OpenImage(
                nbd_options(self.plan, move, self.endpoints),
                size=move.source.image.virtual_size,
                destination=move.destination.path,
            )
            await step.run(self.monitor, self.undo)
            await self._start_mirror(move)

    async def _start_mirror(self, move: DiskMove) -> None:
        job = Job(self.monitor, str(move.job))
        self.jobs.append(job)
        mirror = move.mirror(self.plan.options, blocking=self.plan.blocking_from_start)
        stops = move.job if self.plan.stops_vcpus else None
        await start_job(job, mirror, self.undo, stops=stops)
        await job.refresh()

    async def make_synchronous(self) -> None:
        """Let the guest's writes wait for the destination, where that can be switched (8.2)."""
        for job in self.jobs:
            change = {"id": job.id, "type": "mirror", "copy-mode": "write-blocking"}
            await self.monitor.execute("block-job-change", change)

    async def infos(self) -> list[JobInfo]:
        """The mirrors that there are."""
        ours = {job.id for job in self.jobs}
        return [info for info in await block_jobs(self.monitor) if info.id in ours]

    async def are_synchronous(self) -> bool:
        """Whether both images of each disk are equal now, and stay so."""
        ours = {job.id for job in self.jobs}
        found = await self.monitor.execute("query-block-jobs")
        # QEMU before 8.2 does not say it: where it waits from the start, so it is once it mirrors.
        return all(job.get("actively-synced", True) for job in found if job["device"] in ours)

    async def send_memory(self) -> None:
        """Begin to send the memory; the migration pauses before the switch."""
        capabilities = self.plan.capabilities(self._side)
        await self._step(
            switch_capabilities(capabilities, state=True),
            switch_capabilities(capabilities, state=False),
        )
        changed = self._parameters()
        if changed:
            before = await self.monitor.execute("query-migrate-parameters")
            back = {name: before[name] for name in changed if name in before}
            if back:
                self.undo.command(self.monitor, Command("migrate-set-parameters", back))
            await self.monitor.execute("migrate-set-parameters", changed)
        self.undo.add("cancel the migration", self.cancel)
        await self.monitor.execute("migrate", {"uri": str(self.endpoints.memory)})

    def _parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.plan.options.tls_creds:
            found["tls-creds"] = self.plan.moves[0].tls
        if self.plan.options.bandwidth:
            found["max-bandwidth"] = self.plan.options.bandwidth
        if self.plan.has_bitmaps:
            found["block-bitmap-mapping"] = bitmap_mapping(self.plan, self._side)
        return found

    async def suspend(self) -> None:
        """Stop the vCPUs, marked so that a later process lets them go on."""
        self.suspended = self.plan.moves[0].node
        for step in stop_marks(self.plan.moves[0].job):
            await step.run(self.monitor, self.undo)
        self.undo.command(self.monitor, Command("cont"))
        await self.monitor.execute("stop")

    async def look(self) -> None:
        """Ask how the memory's migration is (``query-migrate``)."""
        self.migration = await self.monitor.execute("query-migrate")

    async def is_over(self) -> bool:
        """Whether the memory's migration has ended, and QEMU has counted all that there was."""
        await self.look()
        if self.status in {"", *MOVING}:
            return False
        if (await self.monitor.execute("query-status"))["status"] == "finish-migrate":
            return False
        await self.look()
        return True

    async def end_mirrors(self) -> None:
        """End all mirrors at the one instant at which the guest stands still.

        Their jobs stay concluded: until the guest is gone they are QEMU's record of the migration.

        Raises:
            MigrationFailed: one did not get its disk over.
        """
        for job in self.jobs:
            if not job.life.mirrored:
                raise _not_over(f"{job.id} does not mirror")
        await asyncio.gather(
            *(
                self.monitor.execute("block-job-cancel", {"device": job.id, "force": False})
                for job in self.jobs
            )
        )
        for job in self.jobs:
            await job.wait(lambda life: life.concluded)
        for job in self.jobs:
            if error := await self.error_of(job):
                raise _not_over(error)
        for move in self.plan.moves:
            if move.node != self.suspended:
                await self.monitor.execute("blockdev-del", {"node-name": move.node})

    async def error_of(self, job: Job) -> str:
        """Why a mirror that has ended has failed; empty if it has not."""
        found = await job.refresh()
        if found is None:
            return job.error or "somebody else has put its job away"
        return found.error or ("somebody else cancelled it" if job.life.cancelled else "")

    async def cancel(self) -> None:
        """Take the memory's migration back, and wait until the guest runs on here."""
        await cancel_migration(self.monitor)
        await let_run(self.monitor, running=self.plan.running)

    async def forget(self) -> tuple[str, ...]:
        """Put away what is left when the guest is gone; what could not be done."""
        undo = Undo()
        capabilities = self.plan.capabilities(self._side)
        undo.command(self.monitor, switch_capabilities(capabilities, state=False))
        if self.plan.options.tls_creds:
            for move in self.plan.moves:
                undo.command(self.monitor, Command("object-del", {"id": move.tls}))
            undo.command(self.monitor, Command("migrate-set-parameters", {"tls-creds": ""}))
        if self.suspended:
            undo.command(self.monitor, Command("blockdev-del", {"node-name": self.suspended}))
        for job in self.jobs:
            job.close()
            undo.command(self.monitor, Command("job-dismiss", {"id": job.id}))
        return await undo.run()

    async def take_back(self) -> tuple[str, ...]:
        """Leave everything as it was, with the guest running on; what could not be done."""
        left = await self.undo.run()
        for job in self.jobs:
            job.close()
        return left

    async def _step(self, command: Command, reverse: Command) -> None:
        await Execute(command, reverse).run(self.monitor, self.undo)


async def cancel_migration(monitor: Monitor) -> None:
    """Take back a migration that is under way, before its switch, and wait until it has ended."""
    patience = time.monotonic() + _SETUP_SECONDS
    while (status := (await monitor.execute("query-migrate")).get("status")) in MOVING:
        late = time.monotonic() > patience
        if status == "cancelling" and late:
            # QEMU 5.2 can miss a cancellation that comes just when it pauses: it waits for ever.
            await attempt(monitor, Command("migrate-continue", {"state": "cancelling"}))
            patience += _SETUP_SECONDS
        # QEMU 11.1 hangs for ever when it is cancelled while it connects.
        elif status != "cancelling" and (status != "setup" or late):
            await attempt(monitor, Command("migrate_cancel"))
            patience = time.monotonic() + _CANCEL_SECONDS
        await asyncio.sleep(_PAUSE_SECONDS)


async def let_run(monitor: Monitor, *, running: bool) -> bool:
    """Wait until the guest is where it was before a migration that has failed; whether it runs.

    QEMU lets it run on by itself; if not, it is told.
    """
    status = await monitor.execute("query-status")
    while status["status"] == "finish-migrate":
        await asyncio.sleep(_PAUSE_SECONDS)
        status = await monitor.execute("query-status")
    if running and not status["running"]:
        await attempt(monitor, Command("cont"))
        status = await monitor.execute("query-status")
    return bool(status["running"])


def _not_over(reason: str) -> errors.MigrationFailed:
    return errors.MigrationFailed(
        f"a disk did not get to the destination: {reason}", reason=reason, runs_on="source"
    )
