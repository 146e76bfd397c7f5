# SPDX-License-Identifier: MIT
"""The destination of a migration: it offers its disks by NBD, then takes the guest.

QEMU would let the guest run as soon as it has arrived. It is told not to (``stop`` while it waits):
the guest runs when the source is known to have let it go, and the exports are closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import discover, errors, graph
from qmpmirror.operations.counterparts import check_bitmaps
from qmpmirror.operations.migration_plan import bitmap_mapping, switch_capabilities, tls_object
from qmpmirror.operations.together import ends_now
from qmpmirror.steps import Command, Execute, attempt
from qmpmirror.undo import Undo

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.endpoints import Endpoints
    from qmpmirror.operations.migration_plan import DiskMove, MigrationPlan, Side

_TAKEN = "already running"


@attrs.define(eq=False)
class Incoming:
    """The destination.

    Attributes:
        plan: the plan.
        endpoints: where both sides meet.
        undo: what makes it wait again as it did before.
        remembers: what makes it forget the migration.
        doomed: whether it has begun to wait for the memory: if that does not come, QEMU ends.
    """

    plan: MigrationPlan
    endpoints: Endpoints
    undo: Undo = attrs.field(factory=Undo, init=False)
    remembers: Undo = attrs.field(factory=Undo, init=False)
    doomed: bool = attrs.field(default=False, init=False)

    @property
    def _side(self) -> Side:
        return self.plan.destination

    @property
    def monitor(self) -> Monitor:
        """The connection."""
        return self._side.monitor

    @property
    def has_ended(self) -> bool:
        """Whether its process is known to be gone."""
        pid = self.monitor.pid
        return pid is not None and discover.has_ended(pid)

    async def offer_disks(self) -> None:
        """Start the NBD server, and export each disk.

        Raises:
            Refused: somebody else's NBD server runs there, or a bitmap would be there twice.
        """
        # It comes first: by it a later process knows that the NBD server is ours.
        await Execute(*_marker(self.plan.marker)).run(self.monitor, self.remembers)
        if self.plan.options.tls_creds:
            name = self.plan.moves[0].tls
            made = tls_object(self._side.schema, name, self.plan.options.tls_creds, "server")
            await self._step(made, Command("object-del", {"id": name}))
        await self._start_server()
        for move in self.plan.moves:
            await self._export(move)
        if self.plan.has_bitmaps:
            check_bitmaps(await graph.read(self.monitor), self.plan.moves)

    async def listen(self) -> None:
        """Wait for the memory; from now on the guest cannot be tried again with this QEMU."""
        await self._step(*self._capabilities())
        if parameters := self._parameters():
            if "tls-creds" in parameters:
                self.undo.command(
                    self.monitor, Command("migrate-set-parameters", {"tls-creds": ""})
                )
            await self.monitor.execute("migrate-set-parameters", parameters)
        await self.monitor.execute("stop")
        self.doomed = True
        await self.monitor.execute("migrate-incoming", {"uri": str(self.endpoints.memory)})

    async def take_back(self) -> tuple[str, ...]:
        """Leave everything as it was, unless it has ended; what could not be done."""
        return await self.close_offers() + await self.forget()

    async def close_offers(self) -> tuple[str, ...]:
        """Close the exports and all else; it still remembers the migration."""
        return await self._run(self.undo)

    async def forget(self) -> tuple[str, ...]:
        """Forget the migration: what is to be said of it has been said."""
        return await self._run(self.remembers)

    async def _run(self, undo: Undo) -> tuple[str, ...]:
        left: tuple[str, ...] = ("it is not reached any more; qmpmirror recover there",)
        if self.monitor.loss is None:
            left = await undo.run()
        if left and await self.is_gone():
            return ()
        return tuple(f"destination: {what}" for what in left)

    async def is_gone(self) -> bool:
        """Whether its process is known to have ended; it hangs up a moment before."""
        pid = self.monitor.pid
        return pid is not None and await ends_now(pid)

    async def run_guest(self) -> bool:
        """Let the guest run; whether it does."""
        await self.monitor.execute("cont")
        return bool((await self.monitor.execute("query-status"))["running"])

    def _parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.plan.options.tls_creds:
            found["tls-creds"] = self.plan.moves[0].tls
        if self.plan.has_bitmaps:
            found["block-bitmap-mapping"] = bitmap_mapping(self.plan, self._side)
        return found

    def _capabilities(self) -> tuple[Command, Command]:
        wanted = self.plan.capabilities(self._side)
        return switch_capabilities(wanted, state=True), switch_capabilities(wanted, state=False)

    async def _start_server(self) -> None:
        arguments: dict[str, Any] = {"addr": self.endpoints.disks.nested()}
        if self.plan.options.tls_creds:
            arguments["tls-creds"] = self.plan.moves[0].tls
        try:
            await self.monitor.execute("nbd-server-start", arguments)
        except errors.CommandFailed as error:
            if _TAKEN not in error.reason:
                raise
            raise errors.Refused(
                "the destination has an NBD server already, which is somebody else's",
                hint="nbd-server-stop ends it",
            ) from error
        self.undo.command(self.monitor, Command("nbd-server-stop"))

    async def _export(self, move: DiskMove) -> None:
        if move.window:
            options = {"driver": "raw", "node-name": move.slice, "size": move.window}
            add = Command("blockdev-add", options | {"file": move.destination.node})
            await self._step(add, Command("blockdev-del", {"node-name": move.slice}))
        export = {
            "type": "nbd",
            "id": move.export,
            "node-name": move.exported,
            "name": move.export,
            "writable": True,
        }
        self.undo.add(f"close export {move.export}", close_export, self.monitor, move.export)
        await self.monitor.execute("block-export-add", export)

    async def _step(self, command: Command, reverse: Command) -> None:
        await Execute(command, reverse).run(self.monitor, self.undo)


def _marker(name: str) -> tuple[Command, Command]:
    options = {"driver": "null-co", "node-name": name, "read-only": True}
    return Command("blockdev-add", options), Command("blockdev-del", {"node-name": name})


async def close_export(monitor: Monitor, export: str) -> None:
    """Close an export at once, and wait until nothing of it uses the node any more."""
    reason = await attempt(monitor, Command("block-export-del", {"id": export, "mode": "hard"}))
    while not reason:
        exports = await monitor.execute("query-block-exports")
        if export not in {each["id"] for each in exports}:
            return
