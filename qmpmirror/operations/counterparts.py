# SPDX-License-Identifier: MIT
"""The disks of both QEMUs of a migration: which is which, and whether they fit."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qmpmirror import discover, disks, errors
from qmpmirror.names import Flag, JobName
from qmpmirror.operations.bitmaps import carried
from qmpmirror.operations.migration_plan import DiskMove

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node
    from qmpmirror.operations.migration import MigrateOptions
    from qmpmirror.operations.migration_plan import Side

Pair = tuple["Disk", "Disk"]


def match(here: Side, there: Side, options: MigrateOptions) -> tuple[list[Pair], list[str]]:
    """The disks whose storage is to be copied, each with its counterpart; and notes.

    Raises:
        Refused: a disk has none, or there is nothing to copy.
        DiskNotFound: and AmbiguousDisk: one that was asked for is not there.
    """
    if options.disks:
        wanted = [disks.find(here.disks, name) for name in options.disks]
        for number, disk in enumerate(wanted):
            if disk in wanted[:number]:
                raise errors.UsageError(f"disk {disk.name!r} was given twice")
    else:
        wanted = [disk for disk in here.disks if disks.is_fixed(disk) and _is_written(disk)]
    pairs, notes = [], []
    for disk in wanted:
        image = disk.image
        if image is None or image.read_only:
            raise errors.EmptyDrive(
                f"disk {disk.name!r} is empty or read-only: its storage cannot be migrated",
                disk=disk.name,
            )
        other = _counterpart(disk, there)
        if not _is_same_file(here, there, disk, other):
            pairs.append((disk, other))
        elif options.disks:
            raise errors.DestinationError(
                f"disk {disk.name!r} is {disk.path} on both sides: there is nothing to copy",
                destination=disk.path,
            )
        else:
            notes.append(f"{disk.name} is {disk.path} on both sides: it is not copied")
    if not pairs:
        raise errors.Refused("there is no disk whose storage is to be copied")
    return pairs, notes


def move(
    here: Side, there: Side, pair: Pair, options: MigrateOptions, run: str
) -> tuple[DiskMove, list[str]]:
    """Check one disk and plan how it is copied; and notes.

    Raises:
        DiskBusy: a block job runs on it, on either side.
        DestinationError: its counterpart does not fit.
    """
    source, destination = pair
    image, other = source.image, destination.image
    assert image is not None  # noqa: S101 - `match` has looked
    assert other is not None  # noqa: S101 - as above
    for side, disk in ((here, source), (there, destination)):
        for job in side.picture.jobs_on(side.picture.stack(disk.node)):
            raise errors.DiskBusy(
                f"disk {disk.name!r} has block job {job} already", disk=disk.name, job_id=job
            )
    shallow = options.incremental and bool(image.child("backing"))
    if shallow and not other.child("backing"):
        raise errors.DestinationError(
            f"{destination.path} has no backing file: an incremental copy of {source.name!r} needs"
            " the same base at the destination",
            destination=destination.path,
        )
    window = _window(source, destination, image, other)
    bitmaps, notes = _bitmaps(here, source, destination, shallow=shallow)
    flags = {Flag.SHALLOW if shallow else Flag.FULL}
    if options.tls_creds:
        flags.add(Flag.OBJECTS)
    if options.synchronous_writes:
        flags.add(Flag.SYNCHRONOUS)
    made = DiskMove(
        source=source,
        destination=destination,
        run=run,
        job=JobName("migrate", run, frozenset(flags), image.name),
        window=window,
        bitmaps=bitmaps,
    )
    return made, notes


def _is_written(disk: Disk) -> bool:
    return disk.image is not None and not disk.image.read_only


def _counterpart(disk: Disk, there: Side) -> Disk:
    """The same disk at the destination: by device id, by drive id, or by libvirt's target."""
    kinds = ("device", "drive", "target")
    for kind in kinds:
        name = getattr(disk, kind)
        found = [each for each in there.disks if name and getattr(each, kind) == name]
        if len(found) == 1:
            return _usable(disk, found[0])
    raise errors.DiskNotFound(
        f"the destination has no counterpart of disk {disk.describe()}",
        disk=disk.name,
        candidates=[each.describe() for each in there.disks],
        hint="it must have the same guest hardware, with the same ids",
    )


def _usable(disk: Disk, found: Disk) -> Disk:
    if found.image is None:
        raise errors.DestinationError(
            f"the destination's disk {found.name!r} is empty", destination=found.name
        )
    if found.image.read_only:
        raise errors.DestinationError(
            f"{found.path} can only be read, and disk {disk.name!r} is written to",
            destination=found.path,
        )
    return found


def _is_same_file(here: Side, there: Side, disk: Disk, other: Disk) -> bool:
    """Whether both sides have the same file or device: shared storage."""
    paths = disk.path, other.path
    if not all(map(os.path.isabs, paths)):
        return paths[0] == paths[1]  # the same URL
    if not all(discover.sees_our_files(side.monitor.pid) for side in (here, there)):
        return False  # another host's path is another file
    return os.path.exists(paths[0]) and os.path.samefile(*paths)


def _window(source: Disk, destination: Disk, image: Node, other: Node) -> int:
    """The bytes of a larger raw destination that are written to; 0 when all are."""
    have, need = other.virtual_size, image.virtual_size
    if have == need:
        return 0
    if other.driver == "raw" and have > need and destination.node == other.name:
        return need
    raise errors.DestinationError(
        f"{destination.path} has {have} bytes, disk {source.name!r} {need}: they must be equal",
        destination=destination.path,
    )


def _bitmaps(
    here: Side, source: Disk, destination: Disk, *, shallow: bool
) -> tuple[tuple[str, ...], list[str]]:
    """The dirty bitmaps that go along; and notes about those that do not."""
    image, other = source.image, destination.image
    assert image is not None  # noqa: S101 - the caller has looked
    assert other is not None  # noqa: S101 - as above
    below = [] if shallow else here.picture.chain(image.name)[1:]
    deeper = {bitmap.name for layer in below for bitmap in carried(layer)}
    kept, notes = [], []
    for bitmap in image.bitmaps:
        if not bitmap.persistent:
            continue
        if bitmap.inconsistent or not bitmap.recording:
            why = "is inconsistent, since a crash" if bitmap.inconsistent else "does not record"
        elif other.driver != "qcow2":
            why = f"cannot be stored by the destination's {other.driver}"
        elif bitmap.name in deeper:
            why = "is in several images of the chain"
        else:
            kept.append(bitmap.name)
            continue
        notes.append(f"bitmap {bitmap.name} of {source.name} {why}: it does not go along")
    return tuple(kept), notes


def check_bitmaps(picture: Graph, moves: Iterable[DiskMove]) -> None:
    """No bitmap that goes along may be there already, or QEMU would end.

    Args:
        picture: the destination's graph; what bitmaps an image holds is known once it is offered.
        moves: the disks.

    Raises:
        DestinationError: one is.
    """
    for move in moves:
        image = move.destination.image
        node = picture.nodes.get(image.name) if image else None
        names = {bitmap.name for bitmap in node.bitmaps} if node else set()
        if found := names & {*move.bitmaps}:
            path = move.destination.path
            raise errors.DestinationError(
                f"{path} has a bitmap {min(found)} already, as disk {move.source.name!r} has",
                destination=path,
            )
