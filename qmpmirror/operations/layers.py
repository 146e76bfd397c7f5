# SPDX-License-Identifier: MIT
"""The images of a disk's backing chain, as commands name them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qmpmirror import discover, disks, errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
            hint="end that one first",
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


def nodes_of(picture: Graph, images: Iterable[Node]) -> list[str]:
    """The nodes of images, top down; those that QEMU has named itself go with others."""
    found = [name for image in images for name in picture.image_nodes(image.name)]
    return [name for name in found if picture.nodes[name].named_by_user]


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
