# SPDX-License-Identifier: MIT
"""The words for the next command line; those for a PC were tried on QEMU 5.2 to 11.1."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import graph, launch
from qmpmirror.disks import Disk

if TYPE_CHECKING:
    from qmpmirror.graph import Node

BOARD = "/machine/unattached/device[18]"
ANONYMOUS = "/machine/peripheral-anon/device[0]/virtio-backend"
NAMED = "/machine/peripheral/vd0/virtio-backend"


@pytest.fixture
def node(recorded: dict[str, dict[str, Any]]) -> Node:
    """The image of a recorded disk, with QEMU's default settings."""
    replies = recorded["idle"]
    found = graph.parse(
        replies["query-block"],
        replies["query-named-block-nodes"],
        replies["x-debug-query-block-graph"],
    )
    return found.nodes["sata"]


def drive(
    node: Node, name: str, qom_path: str, *, target: str = "", removable: bool = False
) -> Disk:
    """A disk of ``-drive``; QEMU has named its nodes."""
    device = "vd0" if qom_path == NAMED else ""
    image = attrs.evolve(node, name="#block123")
    return Disk("#block123", name, device, qom_path, target, image, "/vm/old", removable)


@pytest.mark.parametrize("version", ["11.1"])
@pytest.mark.parametrize(
    ("name", "qom_path", "target", "removable", "place"),
    [
        # QEMU has named it: the name says where it is connected
        ("virtio0", ANONYMOUS, "vda", False, "if=virtio,index=0"),
        ("virtio12", ANONYMOUS, "vdm", False, "if=virtio,index=12"),
        ("ide0-hd0", BOARD, "hda", False, "if=ide,bus=0,unit=0"),
        ("ide1-hd1", BOARD, "hdd", False, "if=ide,bus=1,unit=1"),
        ("ide2-cd0", BOARD, "sdb", True, "if=ide,bus=2,unit=0,media=cdrom"),
        ("scsi0-hd3", BOARD, "sdc", False, "if=scsi,bus=0,unit=3"),
        ("floppy0", BOARD, "fda", True, "if=floppy,index=0"),
        ("sd0", BOARD, "mmcblk0", True, "if=sd,index=0"),
        ("pflash0", "/machine/system.flash0", "", False, "if=pflash,index=0"),
        ("mtd0", BOARD, "", False, "if=mtd,index=0"),
        ("xen0", BOARD, "xvda", False, "if=xen,index=0"),
        # the user has connected it with a -device
        ("none0", ANONYMOUS, "vda", False, "if=none,id=none0"),
        ("drv0", ANONYMOUS, "vda", False, "if=none,id=drv0"),
        ("drv0", NAMED, "vda", False, "if=none,id=drv0"),
        ("virtio0", NAMED, "vda", False, "if=none,id=virtio0"),
        ("ide0-hd0", NAMED, "vda", False, "if=none,id=ide0-hd0"),
        ("virtio", ANONYMOUS, "vda", False, "if=none,id=virtio"),
        ("virtio0x", ANONYMOUS, "vda", False, "if=none,id=virtio0x"),
        ("ide0", ANONYMOUS, "hda", False, "if=none,id=ide0"),
        ("unused", "", "", False, "if=none,id=unused"),
        # the user has named it, and the board connects it
        ("root", BOARD, "hda", False, "id=root"),
        ("dvd", BOARD, "hdc", True, "id=dvd,media=cdrom"),
        ("boot", BOARD, "fda", True, "if=floppy,id=boot"),
    ],
)
def test_where_a_drive_is_connected(
    node: Node, name: str, qom_path: str, *, target: str, removable: bool, place: str
) -> None:
    disk = drive(node, name, qom_path, target=target, removable=removable)
    words = launch.options(disk, "/vm/copy", "qcow2")
    assert words == ["-drive", f"file=/vm/copy,format=qcow2,{place}"]


def test_a_comma_in_the_path(node: Node) -> None:
    words = launch.options(drive(node, "virtio0", ANONYMOUS), "/vm/a,b", "raw")
    assert words == ["-drive", "file=/vm/a,,b,format=raw,if=virtio,index=0"]


SETTINGS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({}, "", {}),
    (
        {"cache_direct": True},
        ",cache.direct=on",
        {"cache": {"direct": True, "no-flush": False}},
    ),
    (
        {"cache_no_flush": True},
        ",cache.no-flush=on",
        {"cache": {"direct": False, "no-flush": True}},
    ),
    ({"read_only": True}, ",read-only=on", {"read-only": True}),
    ({"detect_zeroes": "on"}, ",detect-zeroes=on", {"detect-zeroes": "on"}),
    (
        {"detect_zeroes": "unmap"},
        ",discard=unmap,detect-zeroes=unmap",
        {"discard": "unmap", "detect-zeroes": "unmap"},
    ),
]


@pytest.mark.parametrize("version", ["11.1"])
@pytest.mark.parametrize(("settings", "words", "options"), SETTINGS)
def test_what_the_old_image_was_opened_with(
    node: Node, settings: dict[str, Any], words: str, options: dict[str, Any]
) -> None:
    image = attrs.evolve(node, **settings)
    _, text = launch.options(drive(image, "virtio0", ANONYMOUS), "/x", "qcow2")
    assert text == f"file=/x,format=qcow2,if=virtio,index=0{words}"
    disk = Disk("sata", "", "hd0", "/machine/peripheral/hd0", "sda", image, "/vm/ahci.qcow2")
    option, text = launch.options(disk, "/x", "qcow2")
    assert option == "-blockdev"
    plain = {"driver": "qcow2", "node-name": "sata", "file": {"driver": "file", "filename": "/x"}}
    assert json.loads(text) == plain | options


def test_a_comma_in_the_path_of_a_node(node: Node) -> None:
    disk = Disk("sata", "", "hd0", "/machine/peripheral/hd0", "sda", node, "/vm/ahci.qcow2")
    _, text = launch.options(disk, "/vm/a,b", "raw")
    assert json.loads(text)["file"]["filename"] == "/vm/a,b"
    assert json.loads(text)["driver"] == "raw"


def test_below_a_filter_the_image_keeps_its_own_name(node: Node) -> None:
    """The filter's -blockdev stays as it is, and names the image."""
    disk = Disk("throttle", "", "hd0", "/machine/peripheral/hd0", "sda", node, "/vm/ahci.qcow2")
    _, text = launch.options(disk, "/x", "qcow2")
    assert json.loads(text)["node-name"] == "sata"


def test_an_image_inside_of_its_filter_has_no_name(node: Node) -> None:
    image = attrs.evolve(node, name="#block123")
    disk = Disk("throttle", "", "hd0", "/machine/peripheral/hd0", "sda", image, "/vm/ahci.qcow2")
    option, text = launch.options(disk, "/x", "qcow2")
    assert option == "-blockdev"
    assert json.loads(text) == {"driver": "qcow2", "file": {"driver": "file", "filename": "/x"}}
