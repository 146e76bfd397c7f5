# SPDX-License-Identifier: MIT
"""Every way in which a bare QEMU gets its disk, copied and pivoted under a writing guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import Phase
from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.machine import Machine
    from qmpmirror.testing import ImageTools
    from tests.qemu.conftest import Boot, Connect, Guest, Layers


@attrs.frozen
class Attachment:
    """A way to give QEMU its disk.

    Attributes:
        id: for the test's name.
        options: words of QEMU's command line; ``IMAGE`` stands for the path.
        target: libvirt's name for the disk.
        ids: what else the user has named: the device, the drive, nodes.
        filters: the nodes above the image, top down.
        pivots: the QEMU versions that survive a pivot.
    """

    id: str
    options: str
    target: str
    ids: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    pivots: str = ">= 5.2"

    def arguments(self, image: Path) -> list[str]:
        """The words for a disk on ``image``."""
        return [word.replace("IMAGE", str(image)) for word in self.options.split()]


NODE = "-blockdev qcow2,node-name=fmt0,file.driver=file,file.filename=IMAGE "
NAMED_STORAGE = (
    "-blockdev file,node-name=prot0,filename=IMAGE -blockdev qcow2,node-name=fmt0,file=prot0 "
)
DRIVE = "-drive if=none,id=drv0,format=qcow2,file=IMAGE "
THROTTLE = "-object throttle-group,id=tg0,x-iops-total=100000 "
VIRTIO = "-device virtio-blk-pci,id=dev0,drive="

ATTACHMENTS = (
    Attachment(
        "blkdebug-below-the-format",
        "-blockdev file,node-name=prot0,filename=IMAGE"
        " -blockdev blkdebug,node-name=dbg0,image=prot0"
        " -blockdev qcow2,node-name=fmt0,file=dbg0 " + VIRTIO + "fmt0",
        "vda",
        ("dev0", "fmt0"),
    ),
    Attachment(
        "blkdebug-above-the-image",
        NODE + "-blockdev blkdebug,node-name=dbg0,image=fmt0 " + VIRTIO + "dbg0",
        "vda",
        ("dev0", "dbg0", "fmt0"),
        ("dbg0",),
    ),
    Attachment("drive-virtio", "-drive if=virtio,format=qcow2,file=IMAGE", "vda", ("virtio0",)),
    Attachment(
        "drive-virtio-id", "-drive if=virtio,id=drv0,format=qcow2,file=IMAGE", "vda", ("drv0",)
    ),
    Attachment("drive-none", DRIVE + VIRTIO + "drv0", "vda", ("drv0", "dev0")),
    Attachment("drive-none-anonymous", DRIVE + "-device virtio-blk-pci,drive=drv0", "vda"),
    Attachment("drive-node-name", DRIVE.strip() + ",node-name=fmt0 " + VIRTIO + "drv0", "vda"),
    Attachment("hda", "-hda IMAGE", "hda", ("ide0-hd0",)),
    Attachment("drive-ide", "-drive format=qcow2,file=IMAGE", "hda", ("ide0-hd0",)),
    Attachment("virtio-blk", NODE + VIRTIO + "fmt0", "vda", ("dev0", "fmt0")),
    Attachment("virtio-blk-anonymous", NODE + "-device virtio-blk-pci,drive=fmt0", "vda"),
    Attachment("named-storage", NAMED_STORAGE + VIRTIO + "fmt0", "vda", ("dev0", "fmt0")),
    Attachment(
        "virtio-scsi",
        NODE + "-device virtio-scsi-pci -device scsi-hd,id=dev0,drive=fmt0",
        "sda",
        ("dev0", "fmt0"),
    ),
    Attachment("ide", NODE + "-device ide-hd,id=dev0,drive=fmt0", "hda", ("dev0", "fmt0")),
    Attachment(
        "ahci",
        NODE + "-device ahci,id=ahci0 -device ide-hd,bus=ahci0.0,id=dev0,drive=fmt0",
        "sda",
        ("dev0", "fmt0"),
    ),
    Attachment(
        "nvme", NODE + "-device nvme,serial=s0,id=dev0,drive=fmt0", "nvme0n1", ("dev0", "fmt0")
    ),
    Attachment(
        "usb-xhci",
        NODE + "-device qemu-xhci -device usb-storage,id=dev0,drive=fmt0",
        "sda",
        ("dev0", "fmt0"),
    ),
    Attachment(
        "usb-ehci",
        DRIVE + "-device usb-ehci -device usb-storage,id=dev0,drive=drv0",
        "sda",
        ("dev0", "drv0"),
    ),
    Attachment(
        "virtio-blk-iothread",
        "-object iothread,id=io0 " + NODE + VIRTIO + "fmt0,iothread=io0",
        "vda",
    ),
    Attachment(
        "virtio-scsi-iothread",
        "-object iothread,id=io0 "
        + DRIVE
        + "-device virtio-scsi-pci,iothread=io0 -device scsi-hd,id=dev0,drive=drv0",
        "sda",
    ),
    Attachment(
        "throttle",
        THROTTLE
        + NODE
        + "-blockdev throttle,node-name=thr0,throttle-group=tg0,file=fmt0 "
        + VIRTIO
        + "thr0",
        "vda",
        ("dev0", "thr0", "fmt0"),
        ("thr0",),
    ),
    Attachment(
        "copy-on-read",
        NODE + "-blockdev copy-on-read,node-name=cor0,file=fmt0 " + VIRTIO + "cor0",
        "vda",
        ("dev0", "cor0", "fmt0"),
        ("cor0",),
    ),
    Attachment(
        "throttle-over-copy-on-read",
        THROTTLE
        + NODE
        + "-blockdev copy-on-read,node-name=cor0,file=fmt0 "
        + "-blockdev throttle,node-name=thr0,throttle-group=tg0,file=cor0 "
        + VIRTIO
        + "thr0",
        "vda",
        ("dev0", "thr0", "fmt0"),
        ("thr0", "cor0"),
    ),
    Attachment(
        "copy-on-read-over-throttle-iothread",
        "-object iothread,id=io0 "
        + THROTTLE
        + NODE
        + "-blockdev throttle,node-name=thr0,throttle-group=tg0,file=fmt0 "
        + "-blockdev copy-on-read,node-name=cor0,file=thr0 "
        + VIRTIO
        + "cor0,iothread=io0",
        "vda",
        ("dev0", "cor0", "fmt0"),
        ("cor0", "thr0"),
        # Before 9.0 job-complete with "replaces" holds the iothread's lock twice, and the drain of
        # a throttle node then waits for that iothread: QEMU hangs for ever.
        pivots=">= 9.0",
    ),
    Attachment("drive-copy-on-read", DRIVE.strip() + ",copy-on-read=on " + VIRTIO + "drv0", "vda"),
    Attachment(
        "drive-throttling",
        DRIVE.strip() + ",throttling.iops-total=100000 " + VIRTIO + "drv0",
        "vda",
    ),
)

each_attachment = pytest.mark.parametrize("way", ATTACHMENTS, ids=lambda way: way.id)
each_that_pivots = pytest.mark.parametrize(
    "way",
    [pytest.param(way, id=way.id, marks=pytest.mark.qemu(way.pivots)) for way in ATTACHMENTS],
)
both_depths = pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])


@each_attachment
async def test_disk_is_found_by_all_its_names(
    way: Attachment, layers: Layers, boot: Boot, connect: Connect
) -> None:
    vm = boot(*way.arguments(layers.snap2))
    (drive,) = [drive for drive in vm.execute("query-block") if "inserted" in drive]
    qom_paths = (
        {drive["qdev"]} if "/" in drive["qdev"] else {f"/machine/peripheral/{drive['qdev']}"}
    )
    known = {way.target, *way.ids, *qom_paths, drive["inserted"]["node-name"], str(layers.snap2)}
    async with connect(vm) as machine:
        (disk,) = await machine.disks()
        for name in known:
            assert await machine.disk(name) == disk
    assert (disk.target, disk.path) == (way.target, str(layers.snap2))


@each_that_pivots
@both_depths
async def test_pivot(
    way: Attachment,
    shallow: bool,
    layers: Layers,
    boot: Boot,
    connect: Connect,
    guest: Callable[..., Guest],
    pinned: dict[str, Any],
) -> None:
    vm = boot(*way.arguments(layers.snap2))
    writer, destination = guest(vm), layers.folder / "copy.qcow2"
    writer.scribble()
    async with connect(vm) as machine:
        copy = await machine.blockcopy(way.target, destination, shallow=shallow, **pinned)
        assert copy.phase is Phase.COPYING
        writer.scribble()
        await copy.set_bandwidth(0)
        await copy.ready()
        writer.scribble()
        result = await copy.pivot()
        # Before anything is read, which a copy-on-read filter would store in the copy.
        assert depth_of_the_bases_data(layers, destination) == (2 if shallow else 0)
        before = layers.digest(layers.snap2)
        writer.scribble()
        writer.check()
        assert layers.digest(layers.snap2) == before
        assert (result.outcome, result.left) == (Phase.PIVOTED, ())
        assert result.active == result.destination == str(destination)
        chain = [destination, layers.snap1, layers.base] if shallow else [destination]
        await assert_runs_on(machine, way, chain)
    assert layers.chain(destination) == list(map(str, chain))
    assert vm.execute("query-jobs") == []
    vm.stop()
    assert layers.content(destination) == writer.expected


@each_attachment
@both_depths
async def test_finish(
    way: Attachment,
    shallow: bool,
    layers: Layers,
    boot: Boot,
    connect: Connect,
    guest: Callable[..., Guest],
    pinned: dict[str, Any],
) -> None:
    vm = boot(*way.arguments(layers.snap2))
    writer, destination = guest(vm), layers.folder / "copy.qcow2"
    before = GraphSnapshot.take(vm.execute)
    writer.scribble()
    async with connect(vm) as machine:
        copy = await machine.blockcopy(way.target, destination, shallow=shallow, **pinned)
        assert copy.phase is Phase.COPYING
        writer.scribble()
        await copy.set_bandwidth(0)
        await copy.ready()
        writer.scribble()
        result = await copy.finish()
        copied = bytes(writer.expected)
        writer.scribble()
        writer.check()
        assert (result.outcome, result.left) == (Phase.FINISHED, ())
        assert result.active == str(layers.snap2)
        await assert_runs_on(machine, way, [layers.snap2, layers.snap1, layers.base])
    assert_clean_graph(vm.execute, before)
    assert layers.content(destination) == copied
    assert depth_of_the_bases_data(layers, destination) == (2 if shallow else 0)
    assert layers.content(layers.snap2) == writer.expected != copied


@both_depths
async def test_pivot_of_a_cdrom(
    shallow: bool, layers: Layers, boot: Boot, connect: Connect, guest: Callable[..., Guest]
) -> None:
    node = f"qcow2,node-name=fmt0,read-only=on,file.driver=file,file.filename={layers.snap2}"
    vm = boot("-blockdev", node, "-device", "ide-cd,id=cd0,drive=fmt0")
    reader, destination = guest(vm), layers.folder / "copy.qcow2"
    async with connect(vm) as machine:
        copy = await machine.blockcopy("hda", destination, shallow=shallow)
        await copy.ready()
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        (disk,) = await machine.disks()
    assert disk.image is not None
    assert (disk.path, disk.removable, disk.image.read_only) == (str(destination), True, True)
    reader.check()


@both_depths
async def test_finish_of_a_cdrom(
    shallow: bool, layers: Layers, boot: Boot, connect: Connect, guest: Callable[..., Guest]
) -> None:
    iso = layers.folder / "medium.iso"
    iso.write_bytes(layers.content(layers.snap2))
    vm = boot("-drive", f"if=ide,index=2,media=cdrom,format=raw,file={iso}")
    reader, before, destination = (
        guest(vm),
        GraphSnapshot.take(vm.execute),
        layers.folder / "copy.iso",
    )
    async with connect(vm) as machine:
        copy = await machine.blockcopy("ide1-cd0", destination, shallow=shallow)
        await copy.ready()
        assert (await copy.finish()).outcome is Phase.FINISHED
    assert_clean_graph(vm.execute, before)
    assert destination.read_bytes() == iso.read_bytes()
    reader.check()


async def test_target_names_are_counted_per_bus(
    layers: Layers, images: ImageTools, boot: Boot, connect: Connect
) -> None:
    paths = [images.create(layers.folder / f"{number}.raw", "1M", "raw") for number in range(6)]
    drives = [
        word
        for number, path in enumerate(paths)
        for word in ("-drive", f"if=none,id=drv{number},format=raw,file={path}")
    ]
    devices = [
        ["-device", words]
        for words in (
            "virtio-blk-pci,drive=drv0",
            "virtio-scsi-pci",
            "scsi-hd,drive=drv1",
            "virtio-blk-pci,drive=drv2",
            "scsi-cd,drive=drv3",
            "ide-hd,drive=drv4",
            "nvme,serial=a,drive=drv5",
        )
    ]
    vm = boot(*drives, *(word for words in devices for word in words))
    async with connect(vm) as machine:
        targets = {disk.drive: disk.target for disk in await machine.disks()}
    assert targets == {
        "drv0": "vda",
        "drv1": "sda",
        "drv2": "vdb",
        "drv3": "sdb",
        "drv4": "hda",
        "drv5": "nvme0n1",
    }


async def assert_runs_on(machine: Machine, way: Attachment, chain: list[Path]) -> None:
    """The disk's nodes are its filters and then the chain, and nothing else is open."""
    (disk,) = await machine.disks()
    graph = await machine.graph()
    images = graph.chain(disk.node)
    assert [graph.path(image.name) for image in images] == list(map(str, chain))
    assert tuple(graph.stack(disk.node)[:-1]) == way.filters
    theirs = {name for image in images for name in graph.image_nodes(image.name)}
    assert set(graph.nodes) == {*way.filters, *theirs}


def depth_of_the_bases_data(layers: Layers, image: Path) -> int:
    """The layer below an image that holds a cluster of ``base`` that no guest has written to."""
    cluster = 0x10000
    (extent,) = [
        extent
        for extent in layers.images.map(image)
        if extent["start"] <= cluster < extent["start"] + extent["length"]
    ]
    return int(extent["depth"])
