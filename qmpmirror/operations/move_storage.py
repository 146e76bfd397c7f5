# SPDX-License-Identifier: MIT
"""move-storage: move a disk with its whole chain into another folder, under the live guest.

The active image is mirrored while its backing files, to which nobody writes, are copied as files.
When all of them are there the copy is hung over them, and the guest is switched. Until that instant
the guest runs on the old chain, and nothing of the new one is needed.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, cast

from qmpmirror import discover, disks, errors, graph
from qmpmirror.operations import backing_files, blockcopy, blockjob, layers, programs
from qmpmirror.operations import plan as planning
from qmpmirror.operations.move import Move
from qmpmirror.operations.options import Options

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema


async def start(
    monitor: Monitor, schema: Schema, disk_name: str, folder: str, *, bandwidth: int = 0
) -> Move:
    """Start a move, or go on with one that was interrupted; see `Machine.move_storage`."""
    programs.qemu_img("the chain cannot be moved")
    if not discover.sees_our_files(monitor.pid):
        raise errors.Refused("the QEMU sees other files than this process: nothing can be moved")
    folder = _existing(folder)
    running = await blockjob.attach(monitor, schema, disk_name)
    if isinstance(running, Move) and _leads_to(running, folder):
        return running
    if running is not None:
        running.job.close()
    working_folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, working_folder), disk_name)
    image = layers.active_image(picture, disk, disk_name)
    chain = backing_files.plan(picture, image, folder, working_folder)
    top = _new_path(disk, folder)
    backing_files.check(picture, disk, chain)
    backing_files.check_folder(folder)
    present = await backing_files.first_present(chain)
    plan = await planning.plan(
        monitor,
        schema,
        disk_name,
        top,
        Options(shallow=True, format=image.driver, bandwidth=bandwidth, then="pivot"),
        moved=planning.NewPlace(chain[0].path if chain else "", present),
    )
    move = partial(Move, chain=tuple(chain))
    started = await blockcopy.start(monitor, schema, plan, make=move)
    backing_files.make_alike(disk.path, top)
    return cast("Move", started)


async def is_there(monitor: Monitor, disk_name: str, folder: str) -> bool:
    """Whether all images of a disk are in a folder, and nothing is on its way."""
    working_folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, working_folder), disk_name)
    if disk.image is None or picture.jobs_on(picture.stack(disk.node)):
        return False
    chain = backing_files.plan(picture, disk.image, folder, working_folder)
    paths = [disk.path, *(file.source for file in chain)]
    return all(backing_files.same(os.path.dirname(path), folder) for path in paths)


def _existing(folder: str) -> str:
    path = os.path.abspath(folder)
    if not os.path.isdir(path):
        raise errors.DestinationError(f"there is no folder {path}", destination=path)
    return path


def _new_path(disk: Disk, folder: str) -> str:
    """Where the active image goes."""
    path = os.path.join(folder, os.path.basename(disk.path))
    if backing_files.same(os.path.dirname(disk.path), folder):
        raise errors.Refused(
            f"the active image of disk {disk.name!r} is in {folder} already",
            hint="its backing files are not: move all to another folder",
        )
    if os.path.lexists(path):
        raise errors.DestinationExists(
            f"{path} exists already",
            destination=path,
            hint="if a move has left it whose QEMU has ended since, remove it, and the files beside"
            " it that end in .part or .copied",
        )
    return path


def _leads_to(move: Move, folder: str) -> bool:
    return backing_files.same(os.path.dirname(move.destination), folder)
