# SPDX-License-Identifier: MIT
"""snapshot-create-as: put a fresh overlay over the active image of one disk or several at once.

What the guest has written until then stays as it is in the old images. All disks get their overlays
at one instant, or none does: in one ``transaction``.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import commandline, discover, disks, errors, graph, launch, names, target
from qmpmirror import destination as places
from qmpmirror.launch import Opened
from qmpmirror.operations import bitmaps, layers
from qmpmirror.operations.together import see_through
from qmpmirror.steps import Command, attempt
from qmpmirror.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema
    from qmpmirror.target import Target

    Around = Callable[[], AbstractAsyncContextManager[int]]

_FORMAT: Final = "qcow2"


@attrs.frozen
class Snapshot:
    """What became of one disk.

    Attributes:
        disk: its name.
        source: the image that the guest used; nobody writes to it any more.
        overlay: the image that it uses now.
        launch: the words that open it at QEMU's next start.
    """

    disk: str
    source: str
    overlay: str
    launch: tuple[str, ...]


@attrs.frozen
class SnapshotResult:
    """What became of all.

    Attributes:
        snapshots: of each disk, in the order in which they were given.
        left: what could not be put right again: the guest's file systems, say, that may still be
            frozen.
        filesystems: how many file systems the guest's agent had frozen; None when not asked to.
    """

    snapshots: tuple[Snapshot, ...]
    left: tuple[str, ...] = ()
    filesystems: int | None = None


@attrs.frozen
class _Plan:
    """An overlay that is going to be made."""

    disk: Disk
    path: str
    node: str
    made: Target
    actions: Sequence[Mapping[str, Any]]


async def create(
    monitor: Monitor,
    schema: Schema,
    overlays: Mapping[str, str],
    *,
    reuse_external: bool = False,
    around: Around | None = None,
) -> SnapshotResult:
    """Check everything, make the overlays, then switch to all of them; see `Machine.snapshot`."""
    if not overlays:
        raise errors.UsageError("no disk was given")
    folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    known = await disks.read(monitor, picture, folder)
    plans: list[_Plan] = []
    for name, path in overlays.items():
        disk = disks.find(known, name)
        plan = _planned(monitor, schema, picture, disk, name, path, reuse=reuse_external)
        _check_distinct(plans, plan, name)
        plans.append(plan)
    transaction = Command("transaction", {"actions": [a for plan in plans for a in plan.actions]})
    for command in [*_commands(plans), transaction]:
        schema.check(command.name, command.arguments)
    filesystems, left = await _carry_out(monitor, plans, transaction, around)
    for plan in plans:
        for last in plan.made.last:
            await attempt(monitor, last.command)
    snapshots = tuple(_snapshot(monitor, plan) for plan in plans)
    return SnapshotResult(snapshots, left, filesystems)


async def _carry_out(
    monitor: Monitor, plans: Sequence[_Plan], transaction: Command, around: Around | None
) -> tuple[int | None, tuple[str, ...]]:
    """Do it, or take it back.

    Returns:
        How many file systems were frozen, and what went wrong when it had been done.
    """
    undo, done, filesystems = Undo(), False, None
    try:
        for plan in plans:
            for step in plan.made.steps:
                await step.run(monitor, undo)
        async with AsyncExitStack() as stack:
            if around is not None:
                filesystems = await stack.enter_async_context(around())
            # Cancelled half-way, nobody would know whether it has been carried out.
            await see_through(monitor.execute(transaction.name, transaction.arguments))
            done = True
    except BaseException as error:
        if done and isinstance(error, errors.Error):
            return filesystems, (error.description,)
        if not (done or isinstance(error, errors.ConnectionLost)):
            left = await see_through(undo.run())
            if isinstance(error, errors.Error):
                error.left += left
        raise
    return filesystems, ()


def default_file(path: str, name: str) -> str:
    """Where the overlay of an image goes when nobody has said it, as libvirt has it.

    Raises:
        UsageError: the image is no file.
    """
    if not os.path.isabs(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise errors.UsageError(f"{path} is no regular file: say where its overlay goes")
    return f"{os.path.splitext(path)[0]}.{name}"


def _planned(  # noqa: PLR0917 - all that was read
    monitor: Monitor,
    schema: Schema,
    picture: Graph,
    disk: Disk,
    name: str,
    path: str,
    *,
    reuse: bool,
) -> _Plan:
    image = layers.active_image(picture, disk, name)
    if image.read_only:
        raise errors.Refused(f"disk {name!r} is read-only: there is nothing to keep from it")
    folder = discover.working_folder(monitor.pid)
    sees_our_files = discover.sees_our_files(monitor.pid)
    where = places.parse(path)
    if where.is_local and sees_our_files:
        where = layers.look(picture, disk, where, folder)
        places.check_presence(
            where,
            reuse=reuse,
            hint="give a new path, or --reuse-external for an overlay that you have made",
        )
    run = names.new_run()
    layout = target.Layout.of(image, _FORMAT).on(picture, image.name, folder)
    made = target.Planner(
        run=run,
        destination=where,
        wish=target.Wish(format=_FORMAT, reuse=reuse),
        layout=layout,
        source=image,
        schema=schema,
        sees_our_files=sees_our_files,
        overlay=True,
    ).plan()
    node = names.node_name(run, "format")
    kept = [bitmap for bitmap in bitmaps.carried(image) if bitmap.persistent and bitmap.recording]
    actions = [bitmaps.add_action(node, bitmap) for bitmap in kept]
    switch = {"node": image.name, "overlay": node}
    return _Plan(
        disk, where.text, node, made, [*actions, {"type": "blockdev-snapshot", "data": switch}]
    )


def _check_distinct(plans: Sequence[_Plan], plan: _Plan, name: str) -> None:
    if any(plan.disk.node == other.disk.node for other in plans):
        raise errors.UsageError(f"disk {name!r} was given twice")
    if any(os.path.realpath(plan.path) == os.path.realpath(other.path) for other in plans):
        raise errors.UsageError(f"overlay {plan.path} was given twice")


def _commands(plans: Sequence[_Plan]) -> list[Command]:
    return [command for plan in plans for step in plan.made.steps for command in step.commands()]


def _snapshot(monitor: Monitor, plan: _Plan) -> Snapshot:
    given = commandline.words(monitor.pid, plan.disk)
    words = launch.options(plan.disk, plan.path, _FORMAT, Opened("file", plan.path, words=given))
    return Snapshot(plan.disk.name, plan.disk.path, plan.path, tuple(words))
