# SPDX-License-Identifier: MIT
"""The plan of a migration: both QEMUs as they were found, the disks, and the commands."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover, disks, graph, names
from qmpmirror.names import Flag, JobName
from qmpmirror.steps import Command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.endpoints import Endpoints
    from qmpmirror.operations.migration import MigrateOptions
    from qmpmirror.schema import Schema

CAPABILITIES: Final = {
    "events": Flag.EVENTS_WERE_OFF,
    "return-path": Flag.RETURN_PATH_WAS_OFF,
    "pause-before-switchover": Flag.PAUSE_WAS_OFF,
    "dirty-bitmaps": Flag.BITMAPS_WERE_OFF,
}
"""What a migration needs, and how a later process knows that it was off before.

``return-path`` makes the source wait until the destination has taken everything: before that it
does not say that the migration is completed.
"""

MOVING: Final = frozenset(
    {"setup", "cancelling", "active", "pre-switchover", "device", "wait-unplug", "colo"}
    | {"postcopy-active", "postcopy-paused", "postcopy-recover", "failing"}
)
"""The states of a migration that is under way."""


@attrs.frozen
class Side:
    """One of both QEMUs, as it was found.

    Attributes:
        monitor: the connection.
        schema: what it can do.
        picture: its block graph.
        disks: its disks.
        status: the reply of ``query-status``.
        migration: the reply of ``query-migrate``.
        capabilities: those of the migration that are on.
        memory: bytes of the guest's memory.
    """

    monitor: Monitor
    schema: Schema
    picture: Graph
    disks: tuple[Disk, ...]
    status: Mapping[str, Any]
    migration: Mapping[str, Any]
    capabilities: frozenset[str]
    memory: int

    @classmethod
    async def read(cls, monitor: Monitor, schema: Schema) -> Side:
        """Look at everything.

        Raises:
            Unsupported: it has no guest that could be migrated, such as a storage daemon.
        """
        schema.check("query-migrate", {})
        picture, status, migration, capabilities, memory = await asyncio.gather(
            graph.read(monitor),
            monitor.execute("query-status"),
            monitor.execute("query-migrate"),
            monitor.execute("query-migrate-capabilities"),
            monitor.execute("query-memory-size-summary"),
        )
        known = await disks.read(monitor, picture, discover.working_folder(monitor.pid))
        on = frozenset(each["capability"] for each in capabilities if each["state"])
        total = memory["base-memory"] + memory.get("plugged-memory", 0)
        return cls(monitor, schema, picture, tuple(known), status, migration, on, total)

    def lacking(self, wanted: frozenset[str]) -> frozenset[str]:
        """The capabilities that must be switched on."""
        return wanted - self.capabilities


@attrs.frozen(kw_only=True)
class DiskMove:
    """One disk whose storage is copied.

    Attributes:
        source: the disk at the source.
        destination: its counterpart.
        run: the id of this disk's part of the migration.
        job: the name of its mirror.
        window: bytes of a window that is put over a larger raw destination; 0 for none.
        bitmaps: the dirty bitmaps that go along.
    """

    source: Disk
    destination: Disk
    run: str
    job: JobName
    window: int = 0
    bitmaps: tuple[str, ...] = ()

    @property
    def node(self) -> str:
        """The NBD node at the source."""
        return names.node_name(self.run, "format")

    @property
    def tls(self) -> str:
        """The TLS credentials, on either side."""
        return names.node_name(self.run, "tls")

    @property
    def slice(self) -> str:
        """The window at the destination."""
        return names.node_name(self.run, "slice")

    @property
    def export(self) -> str:
        """The export's id and name at the destination."""
        return names.node_name(self.run, "export")

    @property
    def exported(self) -> str:
        """The destination's node that is exported."""
        return self.slice if self.window else self.destination.node

    def mirror(self, options: MigrateOptions, *, blocking: bool) -> Command:
        """The command that starts its mirror."""
        arguments: dict[str, Any] = {
            "job-id": str(self.job),
            "device": self.source.node,
            "target": self.node,
            "sync": "top" if Flag.SHALLOW in self.job.flags else "full",
            "auto-finalize": True,
            "auto-dismiss": False,
            "on-source-error": "report",
            "on-target-error": "report",
        }
        if options.bandwidth:
            arguments["speed"] = options.bandwidth
        if blocking:
            arguments["copy-mode"] = "write-blocking"
        return Command("blockdev-mirror", arguments)


@attrs.frozen(kw_only=True)
class MigrationPlan:
    """What a migration will do, checked against both live QEMUs.

    Attributes:
        group: the id that all of its names begin with.
        options: how to migrate.
        source: the source as it was found.
        destination: the destination as it was found.
        moves: the disks whose storage is copied.
        running: whether the guest runs.
        stops_vcpus: whether the vCPUs are stopped while each mirror starts.
        notes: what the user must know, one sentence each.
    """

    group: str
    options: MigrateOptions
    source: Side
    destination: Side
    moves: tuple[DiskMove, ...]
    running: bool
    stops_vcpus: bool
    notes: tuple[str, ...]

    @property
    def has_bitmaps(self) -> bool:
        """Whether any dirty bitmap goes along."""
        return any(move.bitmaps for move in self.moves)

    def capabilities(self, side: Side) -> frozenset[str]:
        """Those that must be switched on for a side."""
        wanted = {"events", "return-path"}
        if side is self.source:
            wanted.add("pause-before-switchover")
        if self.has_bitmaps:
            wanted.add("dirty-bitmaps")
        return side.lacking(frozenset(wanted))

    @property
    def blocking_from_start(self) -> bool:
        """Whether the guest's writes wait for the destination from the start."""
        can_switch = self.source.schema.has_command("block-job-change")
        return self.options.synchronous_writes and not can_switch

    @property
    def marker(self) -> str:
        """The node by which the destination remembers the migration."""
        off = frozenset(CAPABILITIES[name] for name in self.capabilities(self.destination))
        role = names.arrival_role(runs=self.running, flags=off)
        return names.node_name(self.moves[0].run, role)


def switch_capabilities(capabilities: frozenset[str], *, state: bool) -> Command:
    """The command that switches capabilities of the migration on or off."""
    states = [{"capability": name, "state": state} for name in sorted(capabilities)]
    return Command("migrate-set-capabilities", {"capabilities": states})


def tls_object(schema: Schema, name: str, folder: str, endpoint: str) -> Command:
    """The command that makes TLS credentials for one end."""
    properties = {"dir": os.path.abspath(folder), "endpoint": endpoint, "verify-peer": True}
    if schema.has_argument("object-add", "props"):  # QEMU 5.2
        return Command(
            "object-add", {"qom-type": "tls-creds-x509", "id": name, "props": properties}
        )
    return Command("object-add", {"qom-type": "tls-creds-x509", "id": name, **properties})


def bitmap_mapping(made: MigrationPlan, side: Side) -> list[dict[str, Any]]:
    """Which node's bitmaps are meant by which alias (``block-bitmap-mapping``)."""
    found = []
    for number, move in enumerate(made.moves):
        disk = move.source if side is made.source else move.destination
        if move.bitmaps and disk.image is not None:
            bitmaps = [{"name": name, "alias": name} for name in move.bitmaps]
            found.append(
                {"node-name": disk.image.name, "alias": f"disk{number}", "bitmaps": bitmaps}
            )
    return found


def nbd_options(made: MigrationPlan, move: DiskMove, endpoints: Endpoints) -> dict[str, Any]:
    """The source's node that writes to the destination."""
    options: dict[str, Any] = {
        "driver": "nbd",
        "node-name": move.node,
        "server": endpoints.disks.flat(),
        "export": move.export,
        "read-only": False,
        # Without it, zeroes are written out in full by QEMU 10.0 and older.
        "discard": "unmap",
    }
    if made.options.tls_creds:
        options["tls-creds"] = move.tls
    return options
