# SPDX-License-Identifier: MIT
"""The guest's disks: what there is, and which one the user means."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors, names
from qmpmirror.graph import JOB_FILTERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor

_PERIPHERAL: Final = "/machine/peripheral/"
_BUSES: Final[Mapping[str, str]] = {
    "virtio-blk": "vd",
    "vhost-user-blk": "vd",
    "scsi": "sd",
    "usb": "sd",
    "ide": "hd",
    "nvme": "nvme",
    "floppy": "fd",
    "sd-card": "mmcblk",
    "xen-disk": "xvd",
}
"""libvirt's target prefix for the QOM type of a device, by its beginning."""


@attrs.frozen
class Disk:
    """A disk of the guest, or a root node that no device uses (as in qemu-storage-daemon).

    Attributes:
        node: the root node under the device, a filter if there is one; empty without a medium.
        drive: the id of its ``-drive``, or an empty string.
        device: the id of its ``-device``, or an empty string.
        qom_path: the device's QOM path; empty for a node without a device.
        target: libvirt's name for it, such as ``vda``; empty for a node without a device.
        image: the node of the active image, below the filters; None without a medium.
        path: the active image's path, absolute where that is known; a URL for other storage.
        removable: whether it is a CD-ROM or floppy drive.
        storage_type: libvirt's word: ``file``, ``block`` or ``network``.
    """

    node: str
    drive: str
    device: str
    qom_path: str
    target: str
    image: Node | None
    path: str
    removable: bool = False
    storage_type: str = "file"

    @property
    def name(self) -> str:
        """The shortest name that identifies it."""
        return self.target or self.device or self.drive or self.node

    def describe(self) -> str:
        """All its names, for messages."""
        ids = (self.target, self.device, self.drive, self.node, self.path)
        known = [name for name in dict.fromkeys(ids) if name]
        return " = ".join(known) if self.image else f"{' = '.join(known)} (empty)"

    def is_under(self, other: Disk) -> bool:
        """Whether both are the same device, or the same node when there is no device."""
        if self.qom_path or other.qom_path:
            return self.qom_path == other.qom_path
        return self.node == other.node


def is_fixed(disk: Disk) -> bool:
    """Whether a guest has a disk, and for good: it is no CD-ROM or floppy drive."""
    return bool(disk.qom_path) and not disk.removable


async def read(monitor: Monitor, graph: Graph, folder: str | None) -> list[Disk]:
    """All disks, in QEMU's own order.

    Args:
        monitor: where to ask for the devices' types (``qom-get``).
        graph: the graph, just read.
        folder: QEMU's working folder, to make paths absolute; None when it is not known.
    """
    found = [_from_drive(drive, graph, folder) for drive in graph.drives]
    prefixes = await asyncio.gather(*(_prefix(monitor, disk) for disk in found))
    used = {disk.node for disk in found}
    loose = [
        Disk(
            node=node.name,
            drive="",
            device="",
            qom_path="",
            target="",
            image=graph.image(node.name),
            path=path_of(graph, node.name, folder),
            storage_type=_storage_type(graph, node.name),
        )
        for node in graph.nodes.values()
        if _is_loose(graph, node, used)
    ]
    return _with_targets(found, prefixes, loose) + loose


def find(disks: Iterable[Disk], name: str) -> Disk:
    """The one disk that ``name`` identifies.

    It is a device id, a drive id, a node name or a QOM path; failing these the path of the active
    image; failing that libvirt's target name.

    Raises:
        DiskNotFound: none; the candidates are listed.
        AmbiguousDisk: several; they are listed.
    """
    disks = list(disks)
    real = os.path.realpath(name) if "/" in name else ""
    kinds = (
        lambda disk: name in {disk.device, disk.drive, disk.node, *_qom_paths(disk)},
        lambda disk: disk.image is not None and name == disk.image.name,
        lambda disk: bool(real) and real == os.path.realpath(disk.path),
        lambda disk: name == disk.target,
    )
    for matches in kinds:
        matching = [disk for disk in disks if name and matches(disk)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise errors.AmbiguousDisk(
                f"disk {name!r} is ambiguous: {_listed(matching)}",
                disk=name,
                candidates=[disk.describe() for disk in matching],
            )
    raise errors.DiskNotFound(
        f"disk {name!r} not found: there is {_listed(disks) or 'no disk at all'}",
        disk=name,
        candidates=[disk.describe() for disk in disks],
        hint=_did_you_mean(disks, name),
    )


def _did_you_mean(disks: Iterable[Disk], name: str) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only for a mistake

    known = [word for disk in disks for word in (*_ids(disk), disk.target, disk.path) if word]
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _from_drive(drive: Mapping[str, Any], graph: Graph, folder: str | None) -> Disk:
    qdev = drive.get("qdev", "")
    device, qom_path = "", qdev
    if qdev.startswith(_PERIPHERAL):
        device = qdev.removeprefix(_PERIPHERAL).split("/")[0]
    elif qdev and not qdev.startswith("/"):
        device, qom_path = qdev, _PERIPHERAL + qdev
    node = drive.get("inserted", {}).get("node-name", "")
    known = node in graph.nodes
    return Disk(
        node=node if known else "",
        drive=drive["device"],
        device=device,
        qom_path=qom_path,
        target="",
        image=graph.image(node) if known else None,
        path=path_of(graph, node, folder) if known else "",
        removable=drive["removable"],
        storage_type=_storage_type(graph, node) if known else "file",
    )


def path_of(graph: Graph, root: str, folder: str | None) -> str:
    """Where the image at or below a node is: an absolute path if possible, else a URL."""
    image = graph.image(root).name
    path = graph.path(image)
    if path:
        return os.path.join(folder, path) if folder else path
    return graph.location(image)


def _storage_type(graph: Graph, root: str) -> str:
    driver = graph.storage(graph.image(root).name).driver
    return {"file": "file", "host_device": "block", "host_cdrom": "block"}.get(driver, "network")


def _is_loose(graph: Graph, node: Node, used: set[str]) -> bool:
    return (
        node.name not in used
        and node.named_by_user
        and node.driver not in JOB_FILTERS
        and graph.is_root(node.name)
        and names.parse_node(node.name) is None
        and not any(user.role == "target" for user in graph.users.get(node.name, ()))
    )


async def _prefix(monitor: Monitor, disk: Disk) -> str:
    if not disk.qom_path:
        return ""
    kind = str(await _qom_get(monitor, disk.qom_path, "type"))
    if kind.startswith("scsi"):
        # usb-storage brings a SCSI disk of its own; both are sd to libvirt.
        return "sd"
    for start, prefix in _BUSES.items():
        if kind.startswith(start):
            if start != "ide":
                return prefix
            bus = str(await _qom_get(monitor, disk.qom_path, "parent_bus"))
            controller = str(await _qom_get(monitor, os.path.dirname(bus), "type"))
            return "sd" if "ahci" in controller else "hd"
    return ""


async def _qom_get(monitor: Monitor, path: str, name: str) -> object:
    try:
        reply: object = await monitor.execute("qom-get", {"path": path, "property": name})
    except errors.CommandFailed:
        return ""
    return reply


def _with_targets(disks: list[Disk], prefixes: list[str], loose: list[Disk]) -> list[Disk]:
    """Number the disks of each bus; a name that is another disk's id is left to that disk."""
    counts: dict[str, int] = {}
    taken = {name: disk for disk in disks + loose for name in _ids(disk)}
    named = []
    for disk, prefix in zip(disks, prefixes, strict=True):
        target = ""
        if prefix:
            number = counts.get(prefix, 0)
            counts[prefix] = number + 1
            target = _target(prefix, number)
        if taken.get(target, disk) is not disk:
            target = ""
        named.append(attrs.evolve(disk, target=target))
    return named


def _qom_paths(disk: Disk) -> tuple[str, str]:
    """As QEMU gives it, and without the part of a virtio device that owns the drive."""
    return disk.qom_path, disk.qom_path.removesuffix("/virtio-backend")


def _ids(disk: Disk) -> set[str]:
    """The names that count before target names when a disk is looked up."""
    return {disk.device, disk.drive, disk.node, disk.image.name if disk.image else ""} - {""}


def _target(prefix: str, number: int) -> str:
    if prefix == "nvme":
        return f"nvme{number}n1"
    if prefix == "mmcblk":
        return f"mmcblk{number}"
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return prefix + letters


def _listed(disks: Iterable[Disk]) -> str:
    return "; ".join(disk.describe() for disk in disks)
