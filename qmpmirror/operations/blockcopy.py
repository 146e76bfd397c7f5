# SPDX-License-Identifier: MIT
"""blockcopy: copy a disk under a live guest, then switch to the copy, or keep it.

A copy is planned first: everything is read and checked, nothing is changed. The plan can be shown
(``--print-qmp``) or carried out; a start that fails takes everything back.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import discover, disks, errors, graph, names, target
from qmpmirror.job import Job
from qmpmirror.life import Ending
from qmpmirror.names import Flag, Mark
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.options import DRIVE_MIRROR, Options
from qmpmirror.steps import Command, Execute, Step, attempt, cancel_job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema


@attrs.frozen
class Plan:
    """What a copy will do, checked against a live QEMU.

    Attributes:
        disk: the source.
        destination: the new image.
        job: the job's name.
        shallow: whether the backing chain is shared: asked for, and there is one.
        backing: the node that both images share; empty for a full copy.
        prepare: the steps that create and open the target.
        mirror: the command that starts the job.
        last: what remains to be done once it runs.
        stops_vcpus: whether the vCPUs are stopped while the mirror starts.
        replaced: the nodes that a pivot makes superfluous, top down.
    """

    disk: Disk
    destination: target.Destination
    job: names.JobName
    shallow: bool
    backing: str
    prepare: tuple[Step, ...]
    mirror: Command
    last: tuple[Step, ...]
    stops_vcpus: bool
    replaced: tuple[str, ...] = ()

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
        mark = [step.command for step in _marks(self)]
        return [*prepare, *mark, Command("stop"), self.mirror, Command("cont"), *last]

    def ending_commands(self, ending: Ending | None) -> list[Command]:
        """The commands that are going to end the copy in the mirroring phase, in order."""
        if ending is None:
            return []
        job = str(self.job)
        mark = {
            "node": self.target_node,
            "name": names.bitmap_name(self.job.run, Mark(ending.value)),
        }
        if ending is Ending.PIVOT:
            end = Command("job-complete", {"id": job})
            after = [Command("block-dirty-bitmap-remove", mark)]
            gone = self.replaced
        else:
            end = Command("block-job-cancel", {"device": job, "force": False})
            after = []
            storage = names.node_name(self.job.run, "storage")
            by_path = Flag.DRIVE_MIRROR in self.job.flags
            gone = () if by_path else (self.target_node, storage)
        delete = [Command("blockdev-del", {"node-name": name}) for name in gone]
        dismiss = Command("job-dismiss", {"id": job})
        return [Command("block-dirty-bitmap-add", mark), end, *after, *delete, dismiss]


async def plan(
    monitor: Monitor, schema: Schema, disk_name: str, destination: str, options: Options
) -> Plan:
    """Read QEMU and check everything. Changes nothing.

    Args:
        monitor: the QEMU.
        schema: what it can do.
        disk_name: anything that identifies the disk.
        destination: the path of the new image; a relative one is taken against our own folder.
        options: how to copy.

    Raises:
        Refused: and its subclasses: the disk or the destination cannot be used as asked, or this
            QEMU lacks something.
    """
    folder = discover.working_folder(monitor.pid)
    sees_our_files = discover.sees_our_files(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, folder), disk_name)
    source = _source(picture, disk, disk_name)
    backing = source.child("backing") if options.shallow else ""
    new_format = options.format or source.driver
    _check_shallow(disk, backing, new_format, options)
    _check_used(picture, disk, options)
    new = target.check(
        _absolute(destination),
        new_format,
        schema,
        [_resolved(picture.path(image.name), folder) for image in picture.chain(disk.node)],
        sees_our_files=sees_our_files,
    )
    layout = target.Layout.of(source, new_format)
    if backing:
        layout = layout.on(picture, backing, folder)
    replaced = picture.replaced_by_pivot(source.name, whole_chain=not backing)
    job = _name_job(source.name, replaced, new, options, shallow=bool(backing))
    create = _preparation(job, new, layout, source, schema, sees_our_files=sees_our_files)
    result = Plan(
        disk=disk,
        destination=new,
        job=job,
        shallow=bool(backing),
        backing=backing,
        prepare=create.steps,
        last=create.last,
        mirror=_mirror(job, disk, new, options, schema),
        replaced=tuple(replaced),
        stops_vcpus=options.safe_start and await _misses_writes_at_start(monitor, schema),
    )
    foreseen = [command for ending in Ending for command in result.ending_commands(ending)]
    for command in [*result.commands(), *foreseen]:
        schema.check(command.name, command.arguments)
    return result


async def start(monitor: Monitor, schema: Schema, plan: Plan) -> Copy:
    """Carry a plan out; return once the job runs.

    Cancelling this, or any error, takes back what was done: the block graph is as before, and a
    file that this run created is removed.

    Raises:
        CommandFailed: QEMU refused a command.
        ConnectionLost: the connection ended; what was done is still there.
    """
    job = Job(monitor, str(plan.job))
    async with AsyncExitStack() as undo:
        try:
            for step in plan.prepare:
                await step.run(monitor, undo)
            undo.enter_context(job)
            undo.push_async_callback(cancel_job, monitor, job.id)
            async with _vcpus_stopped(monitor, plan):
                await monitor.execute(plan.mirror.name, plan.mirror.arguments)
                if plan.stops_vcpus:
                    await _initialized(job)
            for step in plan.last:
                await step.run(monitor, undo)
            await job.refresh()
        except errors.CommandFailed as error:
            raise _explained(error, plan) from error
        undo.pop_all()
    return Copy(
        monitor=monitor,
        schema=schema,
        job=job,
        name=plan.job,
        disk=plan.disk,
        destination=plan.destination.path,
        format=plan.destination.format,
        backing=plan.backing,
    )


def _source(picture: Graph, disk: Disk, disk_name: str) -> graph.Node:
    if disk.image is None:
        raise errors.EmptyDrive(
            f"disk {disk_name!r} has no medium: nothing to copy", disk=disk_name
        )
    jobs = picture.jobs_on(picture.stack(disk.node))
    if jobs:
        raise errors.DiskBusy(
            f"disk {disk_name!r} already has a block job: {jobs[0]}",
            disk=disk_name,
            job_id=jobs[0],
            hint="end that one first",
        )
    return disk.image


def _check_shallow(disk: Disk, backing: str, new_format: str, options: Options) -> None:
    if backing and not target.can_have_backing(new_format):
        raise errors.Refused(
            f"shallow copy of disk {disk.name!r} into a {new_format} file is not possible:"
            f" {new_format} cannot have a backing file"
        )
    if options.via == DRIVE_MIRROR and options.synchronous_writes and backing:
        # drive-mirror opens its target without the backing file: guest writes smaller than a
        # cluster would hide the base's data.
        raise errors.Refused(
            "synchronous writes with a shallow drive-mirror would corrupt the copy",
            hint="use blockdev-mirror",
        )


def _check_used(picture: Graph, disk: Disk, options: Options) -> None:
    if options.via == DRIVE_MIRROR and not disk.qom_path and not picture.is_used(disk.node):
        # The target of a drive-mirror is the job's alone: after a pivot nobody would hold it.
        raise errors.Refused(
            f"drive-mirror of node {disk.node}, which nothing uses, would lose the copy in a pivot",
            hint="use blockdev-mirror",
        )


def _absolute(path: str) -> str:
    if not path or "\0" in path:
        raise errors.UsageError(f"destination {path!r} is no path")
    return os.path.abspath(path)


def _resolved(path: str, folder: str | None) -> str:
    return os.path.join(folder or "", path) if path else ""


def _name_job(
    source: str, replaced: list[str], new: target.Destination, options: Options, *, shallow: bool
) -> names.JobName:
    flags = {Flag.SHALLOW if shallow else Flag.FULL}
    if not new.exists:
        flags.add(Flag.CREATED)
    if options.via == DRIVE_MIRROR:
        flags.add(Flag.DRIVE_MIRROR)
    if options.then:
        flags.add(Flag.THEN_PIVOT if options.then == "pivot" else Flag.THEN_FINISH)
    others = tuple(name for name in replaced if name != source)
    return names.JobName("copy", names.new_run(), frozenset(flags), source, others)


def _preparation(
    job: names.JobName,
    new: target.Destination,
    layout: target.Layout,
    source: graph.Node,
    schema: Schema,
    *,
    sees_our_files: bool,
) -> target.Creation:
    by_drive_mirror = Flag.DRIVE_MIRROR in job.flags
    if by_drive_mirror and layout.backing_node:
        # drive-mirror itself creates the image: only then does it share the source's backing node.
        if not os.path.isabs(layout.backing_file) and ":" not in layout.backing_file:
            raise errors.Refused("drive-mirror needs QEMU's disks to have absolute paths")
        return target.Creation()
    create = target.creation(job.run, new, layout, source, schema, sees_our_files=sees_our_files)
    if by_drive_mirror:
        opening = target.close_storage(job.run)
    else:
        opening = target.opening(job.run, new, layout, source)
    return attrs.evolve(create, steps=(*create.steps, opening))


def _mirror(
    job: names.JobName,
    disk: Disk,
    new: target.Destination,
    options: Options,
    schema: Schema,
) -> Command:
    shallow = Flag.SHALLOW in job.flags
    arguments: dict[str, Any] = {
        "job-id": str(job),
        "device": disk.node,
        "target": names.node_name(job.run, "format"),
        "sync": "top" if shallow else "full",
        "auto-finalize": True,
        "auto-dismiss": False,
        "on-source-error": "report" if options.on_error == "enospc" else options.on_error,
        "on-target-error": options.on_error,
    }
    if options.via == DRIVE_MIRROR:
        arguments["node-name"] = arguments["target"]
        arguments["target"] = new.path
        arguments["format"] = new.format
        arguments["mode"] = "absolute-paths" if shallow else "existing"
    elif not shallow and schema.has_argument(options.via, "target-is-zero"):
        arguments["target-is-zero"] = True
    if disk.image is not None and disk.image.name != disk.node:
        # Filters stay above: the job reads through them and replaces the image below. Sent only
        # when needed, because a second job-complete would then crash QEMU before 10.0.10.
        arguments["replaces"] = disk.image.name
    if options.synchronous_writes:
        arguments["copy-mode"] = "write-blocking"
    optional = {
        "speed": options.bandwidth,
        "granularity": options.granularity,
        "buf-size": options.buf_size,
    }
    arguments |= {key: value for key, value in optional.items() if value}
    return Command(options.via, arguments)


async def _misses_writes_at_start(monitor: Monitor, schema: Schema) -> bool:
    """Whether this QEMU loses writes that come while a mirror starts.

    "mirror: Fix missed dirty bitmap writes during startup" is in 10.0.10, 10.2.2 and 11.0; the bug
    came with 8.2. No schema shows it, so this is the one place where a version decides: on caution.
    """
    if not schema.has_command("stop"):
        return False
    version = (await monitor.execute("query-version"))["qemu"]
    number = (version["major"], version["minor"], version["micro"])
    affected = (8, 2, 0) <= number < (10, 0, 10) or (10, 1, 0) <= number < (10, 2, 2)
    return affected and (await monitor.execute("query-status"))["running"]


def _marks(plan: Plan) -> list[Execute]:
    """The bitmap that tells a later process that it was us who stopped the vCPUs."""
    mark = {"node": plan.target_node, "name": names.bitmap_name(plan.job.run, Mark.STOPPED)}
    if Flag.DRIVE_MIRROR in plan.job.flags:
        return []
    return [
        Execute(Command("block-dirty-bitmap-add", mark), Command("block-dirty-bitmap-remove", mark))
    ]


@asynccontextmanager
async def _vcpus_stopped(monitor: Monitor, plan: Plan) -> AsyncIterator[None]:
    if not plan.stops_vcpus:
        yield
        return
    async with AsyncExitStack() as undo:
        for step in _marks(plan):
            await step.run(monitor, undo)
        undo.push_async_callback(attempt, monitor, Command("cont"))
        await monitor.execute("stop")
        yield


async def _initialized(job: Job) -> None:
    """Wait until the mirror has looked through the source: from then on it misses no write."""
    while not job.life.mirrored and not job.life.concluded:
        found = await job.refresh()
        if found is None or found.total:
            return
        await asyncio.sleep(0.01)


def _explained(error: errors.CommandFailed, plan: Plan) -> errors.Error:
    """QEMU's reason, with what it was about."""
    path = plan.destination.path
    if error.command in {"blockdev-create", "blockdev-add"}:
        return errors.DestinationError(f"{path}: {error.reason}", destination=path)
    return error
