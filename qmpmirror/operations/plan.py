# SPDX-License-Identifier: MIT
"""The plan of a copy: everything is read and checked, nothing is changed.

It can be shown (``--print-qmp``) or carried out (`operations.blockcopy`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import commandline, discover, disks, errors, graph, names, target
from qmpmirror import destination as places
from qmpmirror.life import Ending
from qmpmirror.names import Flag, JobName, Mark
from qmpmirror.operations import cautions, drive_mirror, layers, marks, notes
from qmpmirror.operations.check_base import CheckBase
from qmpmirror.operations.options import DRIVE_MIRROR, Options
from qmpmirror.operations.safe_start import misses_writes_at_start, stop_marks
from qmpmirror.steps import Command, Execute, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.commandline import Given
    from qmpmirror.destination import Destination
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema
    from qmpmirror.target import Target, Wish


@attrs.frozen
class NewPlace:
    """Where the backing files of a disk that is moved with its chain are going to be.

    Attributes:
        backing_file: the path of the first one; empty when the disk has none.
        present: the node of the first image whose counterpart is there already; empty for none.
    """

    backing_file: str
    present: str


@attrs.frozen
class Plan:
    """What a copy will do, checked against a live QEMU.

    Attributes:
        disk: the source.
        destination: where the copy goes.
        format: its image format.
        job: the job's name.
        shallow: whether the backing chain is shared: asked for, and there is one.
        backing: the node that both images share; empty for a full copy.
        prepare: the steps that create and open the target.
        mirror: the command that starts the job.
        last: what remains to be done once it runs.
        stops_vcpus: whether the vCPUs are stopped while the mirror starts.
        replaced: the nodes that a pivot makes superfluous, top down.
        notes: what the user must know before it starts, one sentence each.
    """

    disk: Disk
    destination: places.Destination
    format: str
    job: names.JobName
    shallow: bool
    backing: str
    prepare: tuple[Step, ...]
    mirror: Command
    last: tuple[Execute, ...]
    stops_vcpus: bool
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def target_node(self) -> str:
        """The node that the job writes to."""
        return names.node_name(self.job.run, "format")

    def commands(self) -> list[Command]:
        """Every command that starts the copy, in order."""
        prepare = [command for step in self.prepare for command in step.commands()]
        last = [command for step in self.last for command in step.commands()]
        if not self.stops_vcpus:
            return [*prepare, self.mirror, *last]
        mark = [step.command for step in stop_marks(self.job)]
        return [*prepare, *mark, Command("stop"), self.mirror, Command("cont"), *last]

    def ending_commands(self, ending: Ending | None) -> list[Command]:
        """The commands that are going to end the copy in the mirroring phase, in order."""
        if ending is None:
            return []
        job = str(self.job)
        mark = self.target_node, self.job.run, Mark(ending.value)
        if ending is Ending.PIVOT:
            end = Command("job-complete", {"id": job})
            after = [marks.remove(*mark)]
            gone = self.replaced
        else:
            end = Command("block-job-cancel", {"device": job, "force": False})
            after = []
            storage = names.node_name(self.job.run, "storage")
            by_path = Flag.DRIVE_MIRROR in self.job.flags
            gone = () if by_path else (self.target_node, storage)
        delete = [Command("blockdev-del", {"node-name": name}) for name in gone]
        dismiss = Command("job-dismiss", {"id": job})
        return [marks.add(*mark), end, *after, *delete, dismiss]


async def plan(
    monitor: Monitor,
    schema: Schema,
    disk_name: str,
    destination: str,
    options: Options,
    *,
    member: str = "",
    moved: NewPlace | None = None,
) -> Plan:
    """Read QEMU and check everything. Changes nothing.

    Args:
        monitor: the QEMU.
        schema: what it can do.
        disk_name: anything that identifies the disk.
        destination: as `destination.parse` understands it.
        options: how to copy.
        member: the run id of a group's member; its job does not finalize itself.
        moved: when the chain is moved too, where its other images are going to be.

    Raises:
        Refused: and its subclasses: the disk or the destination cannot be used as asked, or this
            QEMU lacks something.
    """
    folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, folder), disk_name)
    stops_vcpus = options.safe_start and await misses_writes_at_start(monitor, schema)
    planner = _Planner(
        schema=schema,
        picture=picture,
        folder=folder,
        sees_our_files=discover.sees_our_files(monitor.pid),
        given=commandline.given(monitor.pid, disk.path),
        options=options,
        disk=disk,
        source=layers.active_image(picture, disk, disk_name),
        run=member or names.new_run(),
        grouped=bool(member),
        moved=moved,
    )
    made = planner.plan(destination, stops_vcpus=stops_vcpus)
    await cautions.check(monitor, picture, disk, made.format, pivots=options.then == "pivot")
    foreseen = [command for ending in Ending for command in made.ending_commands(ending)]
    for command in [*made.commands(), *foreseen]:
        schema.check(command.name, command.arguments)
    return made


@attrs.frozen(kw_only=True)
class _Planner:
    """What has been read, and the decisions that follow from it."""

    schema: Schema
    picture: Graph
    folder: str | None
    sees_our_files: bool
    given: Given
    options: Options
    disk: Disk
    source: Node
    run: str
    grouped: bool
    moved: NewPlace | None

    @property
    def by_path(self) -> bool:
        """Whether QEMU itself opens the target, by its path."""
        return self.options.via == DRIVE_MIRROR

    @property
    def backing(self) -> str:
        """The node below the active image, if only that image is to be copied."""
        return self.source.child("backing") if self.options.shallow else ""

    def plan(self, text: str, *, stops_vcpus: bool) -> Plan:
        where = self._look(places.parse(text))
        wish = self._wish(where)
        self._check(where, wish)
        made = self._target(self.run, where, wish)
        own_chain = bool(made.flags & {Flag.LATE_CHAIN, Flag.OWN_CHAIN})
        whole_chain = not self.backing or own_chain
        replaced = self.picture.replaced_by_pivot(self.source.name, whole_chain=whole_chain)
        others = tuple(name for name in replaced if name != self.source.name)
        flags = made.flags | self._flags()
        present = self.moved.present if self.moved else ""
        job = JobName("copy", self.run, flags, self.source.name, others, present)
        return Plan(
            disk=self.disk,
            destination=where,
            format=wish.format,
            job=job,
            shallow=bool(self.backing),
            backing="" if own_chain else self.backing,
            prepare=made.steps,
            last=made.last,
            mirror=self._mirror(job, where, wish, made),
            replaced=() if self.options.keep_source else tuple(replaced),
            stops_vcpus=stops_vcpus,
            notes=tuple(self._notes(where, wish)),
        )

    def _notes(self, where: Destination, wish: Wish) -> Iterator[str]:
        if not wish.reuse:
            yield from notes.misnamed(where.text, wish.format)
        yield from notes.foreseen(
            self.picture,
            self.disk,
            self.source,
            self.given,
            wish.format,
            shallow=bool(self.backing),
        )

    def _look(self, where: Destination) -> Destination:
        if not where.is_local or not self.sees_our_files:
            return where
        return layers.look(
            self.picture, self.disk, where, self.folder, blockdev=self.options.blockdev
        )

    def _wish(self, where: Destination) -> Wish:
        """What the target shall be; a format that nobody gave is the source's, or is probed."""
        options = self.options
        new_format = options.format
        if not new_format and where.kind is places.Kind.IMAGE:
            new_format = str(where.options["driver"])
        elif not new_format and options.reuse_external and where.is_local:
            new_format = self._probe(where)
        elif not new_format:
            new_format = "raw" if where.kind is places.Kind.PROTOCOL else self.source.driver
        if options.secret and new_format == "raw":
            new_format = "luks"
        return target.Wish(
            format=new_format,
            reuse=options.reuse_external or where.kind is places.Kind.IMAGE,
            options=options.creation,
            secret=options.secret,
            tls_creds=options.tls_creds,
            detect_zeroes=options.detect_zeroes,
            synchronous=options.synchronous_writes,
            is_zero=options.dest_is_zero,
            server_seconds=options.server_seconds,
            aio=self.given.aio if where.is_local else "",
            late_chain=bool(self.moved),
        )

    def _probe(self, where: Destination) -> str:
        if not self.sees_our_files:
            raise errors.DestinationError(
                f"the format of {where.text} cannot be found out here: give --format",
                destination=where.text,
            )
        if not where.exists:
            return self.source.driver  # refused in a moment, for that
        found = places.probe(where)
        if found not in {"raw", self.source.driver}:
            # What a guest wrote to a raw disk can look like any format.
            raise errors.DestinationError(
                f"{where.text} looks like {found}, but the source is {self.source.driver}",
                destination=where.text,
                hint=f"give --format {found}, or --format raw",
            )
        return found

    def _check(self, where: Destination, wish: Wish) -> None:
        if self.backing and not target.can_have_backing(wish.format):
            raise errors.Refused(
                f"shallow copy of disk {self.disk.name!r} into a {wish.format} file is not"
                f" possible: {wish.format} cannot have a backing file"
            )
        if wish.format == "luks" and not wish.secret:
            raise errors.Refused("format luks needs a passphrase", hint="give --secret FILE")
        if where.is_local and self.sees_our_files:
            places.check_presence(
                where,
                reuse=wish.reuse,
                overwrite=self.options.overwrite,
                hint="give a new path; --reuse-external opens it as it is, --overwrite formats it",
            )
        if self.by_path:
            drive_mirror.check(
                self.picture,
                self.disk,
                where,
                wish,
                synchronous=self.options.synchronous_writes,
                shallow=bool(self.backing),
            )

    def _target(self, run: str, where: Destination, wish: Wish) -> Target:
        layout = target.Layout.of(self.source, wish.format)
        if self.backing:
            layout = layout.on(self.picture, self.backing, self.folder)
        if self.backing and self.moved:
            layout = attrs.evolve(layout, backing_file=self.moved.backing_file)
        made = target.Planner(
            run=run,
            destination=where,
            wish=wish,
            layout=layout,
            source=self.source,
            schema=self.schema,
            sees_our_files=self.sees_our_files,
        ).plan()
        if self.options.check_base and Flag.OWN_CHAIN in made.flags:
            check = CheckBase(self.source.name, names.node_name(run, "format"))
            made = attrs.evolve(made, steps=(*made.steps, check))
        if not self.by_path:
            return made
        if self.backing:
            # drive-mirror itself makes the image: only then does it share the source's backing.
            if not os.path.isabs(layout.backing_file) and ":" not in layout.backing_file:
                raise errors.Refused("drive-mirror needs QEMU's disks to have absolute paths")
            return target.Target(flags=made.flags)
        # It opens the image by its path: instead of opening the format, the storage is closed.
        close = Execute(Command("blockdev-del", {"node-name": names.node_name(run, "storage")}))
        return attrs.evolve(made, steps=(*made.steps[:-1], close))

    def _flags(self) -> frozenset[Flag]:
        options = self.options
        flags = {Flag.SHALLOW if self.backing else Flag.FULL}
        if self.by_path:
            flags.add(Flag.DRIVE_MIRROR)
        if self.grouped:
            flags.add(Flag.GROUP)
        if self.moved:
            flags.add(Flag.MOVE)
        if options.synchronous_writes:
            flags.add(Flag.SYNCHRONOUS)
        if options.check_base:
            flags.add(Flag.CHECK_BASE)
        if options.keep_source:
            flags.add(Flag.KEEP_SOURCE)
        if options.temporary:
            flags.add(Flag.TEMPORARY)
        if options.then:
            flags.add(Flag.THEN_PIVOT if options.then == "pivot" else Flag.THEN_FINISH)
        return frozenset(flags)

    def _mirror(self, job: JobName, where: Destination, wish: Wish, made: Target) -> Command:
        options = self.options
        arguments: dict[str, Any] = {
            "job-id": str(job),
            "device": self.disk.node,
            "target": names.node_name(job.run, "format"),
            "sync": "top" if self.backing else "full",
            # Nothing to wait for: then no client can leave the guest frozen.
            "auto-finalize": not self.grouped,
            "auto-dismiss": False,
            "on-source-error": "report" if options.on_error == "enospc" else options.on_error,
            "on-target-error": options.on_error,
        }
        if self.by_path:
            arguments["node-name"] = arguments["target"]
            arguments["target"] = where.text
            arguments["format"] = wish.format
            arguments["mode"] = "absolute-paths" if self.backing else "existing"
        elif made.zeroed and self.schema.has_argument(options.via, "target-is-zero"):
            arguments["target-is-zero"] = True
        elif options.dest_is_zero and not self.backing:
            raise errors.Unsupported(
                "this QEMU cannot be told that the destination is zero",
                command=options.via,
                argument="target-is-zero",
                hint="QEMU 10.1 and newer can",
            )
        if self.source.name != self.disk.node:
            # Filters stay above: the job reads through them and replaces the image below. Sent
            # only when needed, because a second job-complete then crashes QEMU before 10.0.10.
            arguments["replaces"] = self.source.name
        if options.synchronous_writes:
            arguments["copy-mode"] = "write-blocking"
        optional = {
            "speed": options.bandwidth,
            "granularity": options.granularity,
            "buf-size": options.buf_size,
        }
        arguments |= {key: value for key, value in optional.items() if value}
        return Command(options.via, arguments)
