# SPDX-License-Identifier: MIT
"""The images of a disk's backing chain, as commands name them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qmpmirror import destination as places
from qmpmirror import discover, disks, errors
from qmpmirror.target import backing_string

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qmpmirror.destination import Destination
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor


def active_image(picture: Graph, disk: Disk, disk_name: str) -> Node:
    """The image that the guest uses, when a job can be started on it.

    Raises:
        EmptyDrive: the disk has no medium.
        DiskBusy: it has a block job already.
    """
    if disk.image is None:
        raise errors.EmptyDrive(
            f"disk {disk_name!r} has no medium: nothing to work on", disk=disk_name
        )
    jobs = picture.jobs_on(picture.stack(disk.node))
    if jobs:
        raise errors.DiskBusy(
            f"disk {disk_name!r} already has a block job: {jobs[0]}",
            disk=disk_name,
            job_id=jobs[0],
            hint="end that one first: see qmpmirror blockjob, and qmpmirror recover",
        )
    return disk.image


def find(picture: Graph, chain: Sequence[Node], text: str, disk: Disk, folder: str | None) -> int:
    """The place in a chain of the image with a node name or a path; 0 is the active one.

    Raises:
        Refused: it is not in the chain.
    """
    for place, image in enumerate(chain):
        path = disks.path_of(picture, image.name, folder)
        if text == image.name or os.path.realpath(text) == os.path.realpath(path):
            return place
    images = ", ".join(disks.path_of(picture, image.name, folder) for image in chain)
    raise errors.Refused(
        f"could not find image {text!r} in chain for {disk.name!r}: there is {images}"
    )


def look(
    picture: Graph, disk: Disk, where: Destination, folder: str | None, *, blockdev: bool = False
) -> Destination:
    """Look at a local destination, which must not be in the disk's own chain; as `places.look`."""
    paths = [picture.path(image.name) for image in picture.chain(disk.node)]
    used = [os.path.join(folder or "", path) for path in paths if path]
    return places.look(where, used, blockdev=blockdev)


def check_not_shared(picture: Graph, chain: Sequence[Node], top: int, base: int) -> None:
    """Refuse a commit that would change what others see: QEMU itself lets it happen.

    Raises:
        Refused: something below the top is the backing file of a node outside of the chain too.
    """
    known = {chain[0].name}
    for image in chain:
        below = image.child("backing")
        while below and below not in known:
            known.add(below)
            below = picture.below(below) if picture.nodes[below].is_filter else ""
    for image in chain[top + 1 : base + 1]:
        others = [node.name for node in picture.parents(image.name) if node.name not in known]
        if others:
            raise errors.Refused(
                f"image {picture.location(image.name)} is below node {others[0]} too: a commit"
                " would change what that shows"
            )


def header_name(
    picture: Graph, base: Node, above: Node, folder: str | None, *, relative: bool
) -> str:
    """What the header of the image above is going to say of its new backing file.

    Raises:
        Refused: it cannot be relative.
    """
    name = backing_string(picture, base, folder)
    if not relative:
        return name
    upper = backing_string(picture, above, folder)
    if not (os.path.isabs(name) and os.path.isabs(upper)):
        raise errors.Refused(f"can't keep relative backing relationship: {name} is no file")
    return os.path.relpath(name, os.path.dirname(upper))


def files_of(monitor: Monitor, picture: Graph, images: Iterable[Node]) -> list[str]:
    """The files of images, data files included, where a path means the same to QEMU and to us."""
    if not discover.sees_our_files(monitor.pid):
        return []
    folder = discover.working_folder(monitor.pid) or ""
    found = []
    for image in images:
        for name in picture.image_nodes(image.name):
            node = picture.nodes[name]
            if node.driver == "file" and not node.child("file"):
                found.append(os.path.join(folder, picture.path(name)))
    return found
