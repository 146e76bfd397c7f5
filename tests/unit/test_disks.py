# SPDX-License-Identifier: MIT
"""Which disk is meant, and what disks there are (see the fixture `recorded`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest

from qmpmirror import disks, graph
from qmpmirror.disks import Disk, find
from qmpmirror.errors import AmbiguousDisk, CommandFailed, DiskNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor


@attrs.frozen
class Recorded:
    """Answers ``qom-get`` as the recorded QEMU did."""

    qom: Mapping[str, Mapping[str, str]]

    async def execute(self, command: str, arguments: Mapping[str, str]) -> str:
        try:
            return self.qom[arguments["path"]][arguments["property"]]
        except KeyError:
            raise CommandFailed(command, arguments, "Property not found", "GenericError") from None


def parse(replies: Mapping[str, Any]) -> Graph:
    return graph.parse(
        replies["query-block"],
        replies["query-named-block-nodes"],
        replies["x-debug-query-block-graph"],
    )


async def read(replies: Mapping[str, Any], folder: str | None = None) -> list[Disk]:
    monitor = cast("Monitor", Recorded(replies["qom"]))
    return await disks.read(monitor, parse(replies), folder)


def drives(replies: Mapping[str, Any], kind: str, ids: Sequence[str]) -> dict[str, Any]:
    """A QEMU with many devices of one kind, made of a recorded one."""
    loose = [node for node in replies["query-named-block-nodes"] if node["node-name"] == "loose"]
    return {
        **replies,
        "query-block": [
            {"device": "", "qdev": f"/machine/peripheral/{name}", "removable": False}
            for name in ids
        ],
        "query-named-block-nodes": loose,
        "qom": {f"/machine/peripheral/{name}": {"type": kind} for name in ids},
    }


@pytest.fixture
def node(recorded: dict[str, dict[str, Any]]) -> Node:
    return parse(recorded["idle"]).nodes["top"]


# --- what there is ---------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["idle", "mirroring", "pivoted"])
async def test_all_disks(recorded: dict[str, dict[str, Any]], moment: str) -> None:
    top = "/vm/tgt.qcow2" if moment == "pivoted" else "/vm/top.qcow2"
    found = [
        (disk.target, disk.device, disk.drive, disk.path, disk.removable, disk.storage_type)
        for disk in await read(recorded[moment])
        if disk.qom_path
    ]
    assert found == [
        ("vda", "", "virtio0", "/vm/drv.qcow2", False, "file"),
        ("sda", "sd0", "drv0", "/vm/c.raw", False, "file"),
        ("hda", "", "ide0-cd0", "", True, "file"),
        ("vdb", "vd0", "", top, False, "file"),
        ("nvme0n1", "nv0", "", "/vm/sliced.raw", False, "file"),
        ("vdc", "", "", "/vm/ext.qcow2", False, "file"),
        ("sdb", "hd0", "", "/vm/ahci.qcow2", False, "file"),
    ]


@pytest.mark.parametrize(
    ("moment", "nodes"),
    [
        ("idle", {"loose"}),
        ("mirroring", {"loose"}),
        ("pivoted", {"loose", "top", "tgt2"}),
        ("daemon", {"disk"}),
    ],
)
async def test_nodes_that_no_device_uses(
    recorded: dict[str, dict[str, Any]], moment: str, nodes: set[str]
) -> None:
    """Neither the target of a job nor its filter is offered as a disk."""
    found = [disk for disk in await read(recorded[moment]) if not disk.qom_path]
    assert {disk.node for disk in found} == nodes
    assert all(not disk.target and disk.name == disk.node for disk in found)


async def test_a_disk_below_filters(recorded: dict[str, dict[str, Any]]) -> None:
    disk = find(await read(recorded["idle"]), "vd0")
    assert disk.node == "cor"
    assert disk.image is not None
    assert disk.image.name == "top"
    assert disk.qom_path == "/machine/peripheral/vd0/virtio-backend"


async def test_an_empty_drive(recorded: dict[str, dict[str, Any]]) -> None:
    disk = find(await read(recorded["idle"]), "ide0-cd0")
    assert (disk.image, disk.node, disk.path) == (None, "", "")
    assert disk.describe() == "hda = ide0-cd0 (empty)"


@pytest.mark.parametrize("version", ["5.2"])
async def test_relative_paths_are_made_absolute(recorded: dict[str, dict[str, Any]]) -> None:
    replies = dict(recorded["daemon"])
    replies["query-named-block-nodes"] = [
        {**node, "image": {**node["image"], "filename": "top.qcow2"}}
        for node in replies["query-named-block-nodes"]
    ]
    assert [disk.path for disk in await read(replies)] == ["top.qcow2"]
    assert [disk.path for disk in await read(replies, "/srv")] == ["/srv/top.qcow2"]


@pytest.mark.parametrize("version", ["11.1"])
@pytest.mark.parametrize(
    ("kind", "number", "target"),
    [
        ("virtio-blk-device", 0, "vda"),
        ("virtio-blk-device", 25, "vdz"),
        ("virtio-blk-device", 26, "vdaa"),
        ("virtio-blk-device", 51, "vdaz"),
        ("virtio-blk-device", 52, "vdba"),
        ("virtio-blk-device", 701, "vdzz"),
        ("virtio-blk-device", 702, "vdaaa"),
        ("vhost-user-blk", 1, "vdb"),
        ("scsi-hd", 2, "sdc"),
        ("usb-storage", 0, "sda"),
        ("nvme", 0, "nvme0n1"),
        ("nvme-ns", 11, "nvme11n1"),
        ("floppy", 1, "fdb"),
        ("sd-card", 0, "mmcblk0"),
        ("xen-disk", 0, "xvda"),
        ("cfi.pflash01", 0, ""),
    ],
)
async def test_target_names(
    recorded: dict[str, dict[str, Any]], kind: str, number: int, target: str
) -> None:
    replies = drives(recorded["idle"], kind, [f"id{n}" for n in range(number + 1)])
    found = [disk for disk in await read(replies) if disk.qom_path]
    assert found[number].target == target
    assert found[number].name == (target or f"id{number}")


@pytest.mark.parametrize("version", ["11.1"])
async def test_a_target_name_is_left_to_the_disk_with_that_id(
    recorded: dict[str, dict[str, Any]],
) -> None:
    replies = drives(recorded["idle"], "virtio-blk-device", ["first", "vda", "vdd", "vdc"])
    found = [disk for disk in await read(replies) if disk.qom_path]
    assert [(disk.device, disk.target) for disk in found] == [
        ("first", ""),
        ("vda", "vdb"),
        ("vdd", ""),
        ("vdc", ""),
    ]
    assert [disk.name for disk in found] == ["first", "vdb", "vdd", "vdc"]
    assert find(found, "vda").device == "vda"


async def test_a_target_name_is_left_to_the_disk_with_that_node(
    recorded: dict[str, dict[str, Any]],
) -> None:
    """What domblklist shows as vda must not be another disk than the one that vda finds."""
    for taken in ("ext", "loose", "cor", "top"):
        replies: dict[str, Any] = _renamed(recorded["idle"], taken, "vda")
        found = await read(replies)
        assert find(found, "virtio0").target == ""
        meant = find(found, "vda")
        assert "vda" in {meant.node, meant.image.name if meant.image else ""}
        assert all(find(found, disk.name) == disk for disk in found)


def _renamed(replies: Any, old: str, new: str) -> Any:
    """The replies of a QEMU in which a node has another name."""
    if isinstance(replies, dict):
        return {key: _renamed(value, old, new) for key, value in replies.items()}
    if isinstance(replies, list):
        return [_renamed(value, old, new) for value in replies]
    return new if replies == old else replies


# --- which one is meant ----------------------------------------------------------------------


def disk(
    image: Node | None,
    *,
    node: str = "",
    drive: str = "",
    device: str = "",
    qom_path: str = "",
    target: str = "",
    path: str = "",
) -> Disk:
    """A disk of which only a few names matter."""
    return Disk(node, drive, device, qom_path, target, image, path)


async def test_every_name_of_a_recorded_disk(recorded: dict[str, dict[str, Any]]) -> None:
    found = await read(recorded["idle"])
    for name in (
        "vd0",
        "vdb",
        "cor",
        "top",
        "/vm/top.qcow2",
        "/machine/peripheral/vd0",
        "/machine/peripheral/vd0/virtio-backend",
    ):
        assert find(found, name).device == "vd0"
    for name in ("virtio0", "vda", "/vm/drv.qcow2", "/vm/../vm/drv.qcow2"):
        assert find(found, name).drive == "virtio0"
    for name in ("sd0", "drv0", "sda", "/vm/c.raw", "/machine/peripheral/sd0"):
        assert find(found, name).drive == "drv0"


@pytest.mark.parametrize(
    "name",
    ["", "vdz", "VDA", "thr", "snap", "/vm/snap.qcow2", "top.qcow2", "/machine/peripheral/", "/"],
)
async def test_no_name_of_a_disk(recorded: dict[str, dict[str, Any]], name: str) -> None:
    found = await read(recorded["idle"])
    with pytest.raises(DiskNotFound) as caught:
        find(found, name)
    assert caught.value.disk == name
    assert caught.value.candidates == tuple(disk.describe() for disk in found)
    assert str(caught.value).startswith(f"disk {name!r} not found: there is vda = virtio0 = #block")
    assert "vdb = vd0 = cor = /vm/top.qcow2; " in str(caught.value)


def test_no_disk_at_all() -> None:
    with pytest.raises(DiskNotFound, match=r"^disk 'vda' not found: there is no disk at all$"):
        find([], "vda")


def test_an_id_comes_before_anything_else(node: Node) -> None:
    by_id = disk(None, device="x")
    others = [
        disk(attrs.evolve(node, name="x"), node="root"),
        disk(node, node="other", target="x"),
    ]
    assert find([*others, by_id], "x") is by_id
    assert find(others, "x") is others[0]
    assert find(others[1:], "x") is others[1]


def test_a_path_comes_before_a_target(tmp_path: Path, node: Node) -> None:
    name = str(tmp_path / "vda")
    by_path = disk(node, device="a", path=name)
    by_target = disk(node, device="b", path="/vm/b", target=name)
    assert find([by_target, by_path], name) is by_path


def test_a_path_through_a_link(tmp_path: Path, node: Node) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    wanted = disk(node, device="a", path=str(tmp_path / "real" / "image"))
    assert find([wanted], str(tmp_path / "link" / "image")) is wanted


@pytest.mark.parametrize(
    "facts",
    [
        [{"device": "x"}, {"drive": "x"}],
        [{"node": "x", "device": "a"}, {"device": "x"}],
        [{"path": "/vm/x", "device": "a"}, {"path": "/vm/../vm/x", "device": "b"}],
        [{"target": "x", "device": "a"}, {"target": "x", "device": "b"}],
    ],
)
def test_several_disks_of_one_name(node: Node, facts: list[dict[str, str]]) -> None:
    name = "/vm/x" if "path" in facts[0] else "x"
    found = [disk(node, **fact) for fact in facts]
    with pytest.raises(AmbiguousDisk) as caught:
        find([*found, disk(node, device="other")], name)
    assert caught.value.candidates == tuple(each.describe() for each in found)
    listed = "; ".join(each.describe() for each in found)
    assert str(caught.value) == f"disk {name!r} is ambiguous: {listed}"


def test_an_image_of_the_same_name_twice(node: Node) -> None:
    named = attrs.evolve(node, name="x")
    with pytest.raises(AmbiguousDisk):
        find([disk(named, device="a"), disk(named, device="b")], "x")


# --- one disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"target": "vda", "device": "d", "drive": "v", "node": "n"}, "vda"),
        ({"device": "d", "drive": "v", "node": "n"}, "d"),
        ({"drive": "v", "node": "n"}, "v"),
        ({"node": "n"}, "n"),
    ],
)
def test_the_shortest_name(node: Node, facts: dict[str, str], name: str) -> None:
    assert disk(node, **facts).name == name


def test_a_description_says_each_name_once(node: Node) -> None:
    twice = disk(node, target="vda", device="vda", drive="v", node="v", path="/vm/a")
    assert twice.describe() == "vda = v = /vm/a"


def test_the_same_disk_under_another_image(node: Node) -> None:
    before = disk(node, qom_path="/machine/a", node="old")
    assert before.is_under(disk(node, qom_path="/machine/a", node="new"))
    assert not before.is_under(disk(node, qom_path="/machine/b", node="old"))
    assert not before.is_under(disk(node, node="old"))
    assert disk(node, node="old").is_under(disk(node, node="old"))
    assert not disk(node, node="old").is_under(disk(node, node="new"))
