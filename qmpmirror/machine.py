# SPDX-License-Identifier: MIT
"""The public face: a connection to one QEMU, and what can be done with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import address, discover, disks, graph, schema, stats
from qmpmirror.agent import frozen
from qmpmirror.connection import CONNECT_SECONDS, open_monitor
from qmpmirror.job import JobInfo, block_jobs
from qmpmirror.monitor import Monitor, Transcript
from qmpmirror.operations import (
    blockcommit,
    blockcopy,
    blockjob,
    blockpull,
    group,
    image_create,
    migrate,
    move_storage,
    recover,
    snapshot,
)
from qmpmirror.operations import plan as planning
from qmpmirror.operations.blockcommit import CommitOptions
from qmpmirror.operations.findings import Way
from qmpmirror.operations.group import MAX_FREEZE
from qmpmirror.operations.migration import MigrateOptions
from qmpmirror.operations.options import Options

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from types import TracebackType

    from qemu.qmp import QMPClient
    from typing_extensions import Unpack

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.operations.blockcommit import ActiveCommit, CommitKeywords, InnerCommit
    from qmpmirror.operations.blockpull import Pull
    from qmpmirror.operations.copy import Copy
    from qmpmirror.operations.findings import Finding
    from qmpmirror.operations.group import CopyGroup, Member
    from qmpmirror.operations.handle import BlockJob
    from qmpmirror.operations.image_create import Flattened
    from qmpmirror.operations.migration import MigrateKeywords, MigrationResult
    from qmpmirror.operations.move import Move
    from qmpmirror.operations.options import Keywords
    from qmpmirror.operations.plan import Plan
    from qmpmirror.operations.snapshot import SnapshotResult
    from qmpmirror.schema import Schema
    from qmpmirror.stats import Sizes, Traffic

__all__: Final = ["Machine", "connect"]


@attrs.define(eq=False, init=False)
class Machine:
    """One QEMU (or qemu-storage-daemon) over one QMP connection.

    Use `connect` to get one, or wrap a connected `qemu.qmp.QMPClient` of your own, which stays
    yours: ``async with Machine(client) as vm`` does not disconnect it.
    Leaving ``async with`` leaves running jobs running.

    Attributes:
        monitor: the connection.
    """

    monitor: Monitor
    _schema: Schema | None

    def __init__(self, client: QMPClient | Monitor) -> None:
        """Wrap a connection; needs a running event loop."""
        self.monitor = client if isinstance(client, Monitor) else Monitor(client)
        self._schema = None

    async def __aenter__(self) -> Machine:  # noqa: PYI034 - the class is not made for subclassing
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connection; running jobs go on. Does nothing the second time."""
        await self.monitor.close()

    async def schema(self) -> Schema:
        """What this QEMU can do (``query-qmp-schema``, asked once)."""
        if self._schema is None:
            self._schema = await schema.read(self.monitor)
        return self._schema

    async def graph(self) -> Graph:
        """The block graph as it is now."""
        return await graph.read(self.monitor)

    async def disks(self) -> list[Disk]:
        """The guest's disks, and the root nodes that no device uses."""
        folder = discover.working_folder(self.monitor.pid)
        return await disks.read(self.monitor, await self.graph(), folder)

    async def disk(self, name: str) -> Disk:
        """The disk that ``name`` identifies.

        It is a device id, drive id, node name, QOM path, the path of the active image, or
        libvirt's target name (``vda``).

        Raises:
            DiskNotFound: none; the error lists the candidates.
            AmbiguousDisk: several; the error lists them.
        """
        return disks.find(await self.disks(), name)

    async def sizes(self, disk: Disk) -> Sizes:
        """Capacity, allocation and physical size of a disk, in bytes (``query-blockstats``)."""
        return await stats.sizes(self.monitor, await self.graph(), disk)

    async def traffic(self, disks: list[Disk]) -> Traffic:
        """What the guest has read and written on these disks together (``query-blockstats``)."""
        return sum(await stats.traffic(self.monitor, disks), stats.Traffic())

    async def jobs(self) -> list[JobInfo]:
        """All block jobs, concluded ones included (``query-block-jobs``)."""
        return await block_jobs(self.monitor)

    async def blockjob(self, disk: str) -> BlockJob | None:
        """The block job on a disk, whoever has started it; None when there is none.

        Args:
            disk: as for `disk`.

        Returns:
            For a job of ours what has started it, such as a `Copy` with all its endings; else a
            `BlockJob`.
        """
        return await blockjob.attach(self.monitor, await self.schema(), disk)

    async def recover(self, way: Way = Way.LEAVE, *, dry_run: bool = False) -> list[Finding]:
        """Finish or undo what interrupted runs have left; see `operations.recover.recover`."""
        return await recover.recover(self.monitor, await self.schema(), way, dry_run=dry_run)

    async def blockcopy(
        self, disk: str, destination: str | os.PathLike[str], **options: Unpack[Keywords]
    ) -> Copy:
        """Start to copy a disk under the live guest; return once the job runs.

        Cancelling this, or any error, takes everything back: the block graph is as before, and a
        file that this call created is removed.

        Args:
            disk: as for `disk`.
            destination: a path (relative to this process's folder), ``nbd://HOST/EXPORT``,
                ``nbd+unix:///EXPORT?socket=PATH``, or ``json:{...}`` with QEMU's own options.
            options: the fields of `Options`, such as ``shallow=True`` or ``format="raw"``.

        Raises:
            UsageError: a value that no QEMU could accept.
            Refused: the disk or destination cannot be used so, or this QEMU lacks something.
            CommandTimeout: QEMU did not answer.
            ConnectionLost: the connection ended.
        """
        return await self.start(await self.plan_blockcopy(disk, destination, Options(**options)))

    async def blockcopy_group(
        self, members: Iterable[Member], *, max_freeze: float = MAX_FREEZE
    ) -> CopyGroup:
        """Start to copy several disks that are ended at one instant; return once all jobs run.

        When one cannot be started, the others are taken back. Cancelling this does so too.

        Args:
            members: a disk, its destination and how to copy it, for each.
            max_freeze: seconds that the guest's writes may wait for the cut; when they pass,
                everything is rolled back.

        Raises: as `blockcopy`.
        """
        return await group.start(self.monitor, await self.schema(), members, max_freeze=max_freeze)

    async def blockcommit(
        self, disk: str, **options: Unpack[CommitKeywords]
    ) -> ActiveCommit | InnerCommit:
        """Start to write images of a disk's chain into one below them; return once the job runs.

        Cancelling this, or any error, takes it back; what was written to the base by then stays,
        which changes nothing of what the guest sees.

        Args:
            disk: as for `disk`.
            options: the fields of `CommitOptions`, such as ``shallow=True`` or ``active=True``.

        Returns:
            An `ActiveCommit`, with the endings of a copy, when the active image is committed; else
            an `InnerCommit`, which ends by itself.

        Raises: as `blockcopy`.
        """
        return await blockcommit.start(
            self.monitor, await self.schema(), disk, CommitOptions(**options)
        )

    async def blockpull(
        self, disk: str, *, base: str = "", bandwidth: int = 0, keep_relative: bool = False
    ) -> Pull:
        """Start to read into a disk's active image what lies below it; return once the job runs.

        Cancelling this, or any error, takes it back; what was read by then stays.

        Args:
            disk: as for `disk`.
            base: node name or path of the image that stays below; empty to need none any more.
            bandwidth: limit in bytes/s, 0 for none.
            keep_relative: the active image names its new backing file relative to itself.

        Raises: as `blockcopy`.
        """
        return await blockpull.start(
            self.monitor,
            await self.schema(),
            disk,
            base=base,
            bandwidth=bandwidth,
            keep_relative=keep_relative,
        )

    async def snapshot(
        self,
        overlays: Mapping[str, str | os.PathLike[str]],
        *,
        reuse_external: bool = False,
        agent: str = "",
    ) -> SnapshotResult:
        """Put overlays over the active images of disks, all at one instant (``transaction``).

        The old images are not written to any more. Persistent dirty bitmaps go on in the overlays.
        Cancelling this, or any error, takes everything back, unless the instant has come already.

        Args:
            overlays: for each disk, as for `disk`, where its qcow2 overlay goes.
            reuse_external: the overlays are there; they must name their backing files.
            agent: the socket of the guest's agent, to have it freeze its file systems meanwhile.

        Raises: as `blockcopy`.
        """
        return await snapshot.create(
            self.monitor,
            await self.schema(),
            {disk: os.fspath(path) for disk, path in overlays.items()},
            reuse_external=reuse_external,
            around=(lambda: frozen(agent)) if agent else None,
        )

    async def image_create(
        self,
        disk: str,
        image: str | os.PathLike[str],
        *,
        format: str = "qcow2",  # noqa: A002 - the field's word
        compress: bool = False,
        bandwidth: int = 0,
    ) -> Flattened:
        """Make one image of a disk as it is at one instant, its whole chain in it.

        The top image is copied while the guest runs; the copy, a file beside the image, is then
        flattened by ``qemu-img convert`` and removed. Cancelling this, or any error, removes both.

        Args:
            disk: as for `disk`.
            image: the path of the new image.
            format: its format.
            compress: whether its clusters are compressed.
            bandwidth: limit of the copy in bytes/s, 0 for none.

        Raises: as `blockcopy`.
            JobFailed: the copy failed.
        """
        return await image_create.create(
            self.monitor,
            await self.schema(),
            disk,
            os.fspath(image),
            new_format=format,
            compress=compress,
            bandwidth=bandwidth,
        )

    async def move_storage(
        self, disk: str, folder: str | os.PathLike[str], *, bandwidth: int = 0
    ) -> Move:
        """Start to move a disk with its whole chain into another folder; return once the job runs.

        The active image is mirrored; its backing files are copied as files by ``cp`` meanwhile, in
        `Move.ready`. An image that is in the folder already is used if it holds the same and stands
        on the same. `Move.pivot` ends it; the old images stay. When an interrupted move of this
        disk to this folder is still there, that one is returned. Cancelling this, or any error,
        takes everything back.

        Args:
            disk: as for `disk`.
            folder: where all images go, under the names that they have.
            bandwidth: limit of the mirror in bytes/s, 0 for none.

        Raises: as `blockcopy`.
        """
        return await move_storage.start(
            self.monitor, await self.schema(), disk, os.fspath(folder), bandwidth=bandwidth
        )

    async def migrate(
        self, destination: Machine, **options: Unpack[MigrateKeywords]
    ) -> MigrationResult:
        """Move the guest to another QEMU that waits for it and does not share its storage.

        The disks go by NBD and ``blockdev-mirror``, the memory by ``migrate``. Cancelling this, or
        any error before the switch, leaves the guest running here; from then on (milliseconds) it
        is seen through.

        Args:
            destination: a QEMU started with ``-incoming defer`` and the same guest hardware.
            options: the fields of `MigrateOptions`, such as ``incremental=True``.

        Raises: as `blockcopy`.
            MigrationFailed: it failed; `MigrationFailed.runs_on` says where the guest is.
        """
        here = self.monitor, await self.schema()
        there = destination.monitor, await destination.schema()
        return await migrate.migrate(here, there, MigrateOptions(**options))

    async def plan_blockcopy(
        self, disk: str, destination: str | os.PathLike[str], options: Options
    ) -> Plan:
        """Check a copy and plan its commands without changing anything; raises as `blockcopy`."""
        return await planning.plan(
            self.monitor, await self.schema(), disk, str(destination), options
        )

    async def start(self, plan: Plan) -> Copy:
        """Carry out a plan of `plan_blockcopy`; raises as `blockcopy`."""
        return await blockcopy.start(self.monitor, await self.schema(), plan)


@attrs.define(eq=False)
class _Connecting:
    """Makes ``await connect(...)`` and ``async with connect(...)`` both work."""

    _text: str
    _seconds: float
    _transcript: str | os.PathLike[str] | None
    _machine: Machine | None = attrs.field(default=None, init=False)

    def __await__(self) -> Generator[object, None, Machine]:
        return self._open().__await__()

    async def __aenter__(self) -> Machine:
        self._machine = await self._open()
        return self._machine

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._machine is not None:
            await self._machine.close()

    async def _open(self) -> Machine:
        domain = address.resolve(self._text)
        transcript = None if self._transcript is None else Transcript.open(self._transcript)
        try:
            monitor = await open_monitor(domain, seconds=self._seconds, transcript=transcript)
        except BaseException:
            if transcript is not None:
                transcript.close()
            raise
        return Machine(monitor)


def connect(
    domain: str,
    *,
    timeout: float = CONNECT_SECONDS,
    transcript: str | os.PathLike[str] | None = None,
) -> _Connecting:
    """Connect to a running QEMU.

    Use it as ``async with connect(...) as vm`` or ``vm = await connect(...)``.

    Args:
        domain: a path of a QMP unix socket, ``unix:PATH``, ``HOST:PORT``, ``tcp:HOST:PORT``, or the
            ``-name`` or pid of a QEMU on this host.
        timeout: seconds until the monitor must have greeted us.
        transcript: a file to which everything that passes is written, one JSON object a line.

    Raises:
        ConnectError: or one of its subclasses, when awaited or entered.
    """
    return _Connecting(domain, timeout, transcript)
