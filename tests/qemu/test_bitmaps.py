# SPDX-License-Identifier: MIT
"""Dirty bitmaps are carried over to the copy, and miss no write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase
from qmpmirror.operations.options import Options

if TYPE_CHECKING:
    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Connect, Layers

KIB = 1024
DISKS: dict[str, list[str]] = {
    "drive": [
        "-drive",
        "if=none,id=d,format=qcow2,file={}",
        "-device",
        "virtio-blk,drive=d,id=vd0",
    ],
    "blockdev": [
        *("-blockdev", "qcow2,node-name=d,file.driver=file,file.filename={}"),
        *("-device", "virtio-blk,drive=d,id=vd0"),
    ],
}


@pytest.fixture(params=list(DISKS.values()), ids=list(DISKS))
def vm(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Qemu:
    return boot(*(word.format(layers.snap2) for word in request.param))


def source_node(vm: Qemu) -> str:
    (drive,) = [drive for drive in vm.execute("query-block") if "virtio" in drive.get("qdev", "")]
    name: str = drive["inserted"]["node-name"]
    return name


def bitmaps(vm: Qemu) -> dict[str, dict[str, Any]]:
    (drive,) = [drive for drive in vm.execute("query-block") if "virtio" in drive.get("qdev", "")]
    found = drive["inserted"].get("dirty-bitmaps", [])
    return {bitmap["name"]: bitmap for bitmap in found if bitmap.get("name")}


def write(vm: Qemu, offset: int) -> None:
    vm.io("/machine/peripheral/vd0/virtio-backend", f"write -P 1 {offset} 4096")


@pytest.mark.parametrize("shallow", [True, False])
async def test_bitmaps_go_with_the_guest(
    vm: Qemu, connect: Connect, layers: Layers, *, shallow: bool
) -> None:
    node = source_node(vm)
    kinds: dict[str, dict[str, Any]] = {
        "stored": {"persistent": True},
        "passing": {"granularity": 32 * KIB},
        "stopped": {"persistent": True, "disabled": True},
    }
    for name, options in kinds.items():
        vm.execute("block-dirty-bitmap-add", node=node, name=name, **options)
    write(vm, 0)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", layers.folder / "copy", shallow=shallow)
        await copy.ready()
        write(vm, 1024 * KIB)
        result = await copy.pivot()
        assert (result.outcome, result.notes) == (Phase.PIVOTED, ())
    write(vm, 2048 * KIB)
    found = bitmaps(vm)
    assert set(found) == {"stored", "passing", "stopped"}
    assert found["stored"]["count"] >= 3 * 64 * KIB
    assert found["passing"]["count"] >= 3 * 32 * KIB
    assert found["passing"]["granularity"] == 32 * KIB
    assert found["stopped"]["count"] == 0
    assert not found["stopped"]["recording"]
    assert [found[name]["persistent"] for name in ("stored", "passing")] == [True, False]
    vm.stop()
    stored = layers.images.info(layers.folder / "copy")["format-specific"]["data"]["bitmaps"]
    assert {bitmap["name"] for bitmap in stored} == {"stored", "stopped"}


async def test_a_full_copy_takes_those_of_the_chain(
    boot: Boot, connect: Connect, layers: Layers
) -> None:
    for path, offset in ((layers.snap1, 1), (layers.snap2, 2)):
        layers.images._run("qemu-img", "bitmap", "--add", str(path), "both")
        layers.images.io(path, f"write -P 1 {offset}M 4k")
    layers.images._run("qemu-img", "bitmap", "--add", str(layers.base), "below-a-gap")
    layers.images._run("qemu-img", "bitmap", "--add", str(layers.snap2), "below-a-gap")
    vm = boot(*(word.format(layers.snap2) for word in DISKS["blockdev"]))
    alone = bitmaps(vm)["both"]["count"]
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", layers.folder / "copy")
        await copy.ready()
        await copy.pivot()
    found = bitmaps(vm)
    assert found["both"]["count"] >= alone + 64 * KIB
    assert set(found) == {"both", "below-a-gap"}


async def test_what_raw_cannot_store_is_said_before_the_start(
    vm: Qemu, connect: Connect, layers: Layers
) -> None:
    vm.execute("block-dirty-bitmap-add", node=source_node(vm), name="stored", persistent=True)
    async with connect(vm) as machine:
        plan = await machine.plan_blockcopy("vd0", layers.folder / "copy", Options(format="raw"))
        (note,) = plan.notes
        assert "bitmap stored will be lost when QEMU ends: raw cannot store it" in note
        copy = await machine.start(plan)
        await copy.ready()
        write(vm, 0)
        assert (await copy.pivot()).notes == (note,)
    found = bitmaps(vm)
    assert found["stored"]["count"] >= 64 * KIB
    assert not found["stored"]["persistent"]


async def test_an_inconsistent_bitmap_is_named_and_left(
    boot: Boot, connect: Connect, layers: Layers
) -> None:
    layers.images._run("qemu-img", "bitmap", "--add", str(layers.snap2), "broken")
    first = boot(*(word.format(layers.snap2) for word in DISKS["blockdev"]))
    first.kill()  # a crash leaves the bitmap in use for ever
    vm = boot(*(word.format(layers.snap2) for word in DISKS["blockdev"]))
    assert bitmaps(vm)["broken"]["inconsistent"]
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", layers.folder / "copy")
        await copy.ready()
        (note,) = (await copy.pivot()).notes
        assert "bitmap broken is inconsistent" in note
    assert bitmaps(vm) == {}
