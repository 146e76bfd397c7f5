# SPDX-License-Identifier: MIT
"""A real Linux guest writes numbered, checksummed, synchronous blocks while its disk is copied.

Whatever it was told to be stable must be on the image that it runs on; and a finished copy must be
its disk at one instant.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import Phase
from qmpmirror.testing.guest import (
    Guest,
    Workload,
    acknowledged,
    check_image,
    check_point_in_time,
    errors,
    flatten,
    until_acknowledged,
)
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror import Copy
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

SIZE = 64 * 1024 * 1024
SLOW = 256 * 1024  # bytes/s: keeps a copy in the copying phase
WRITES = 150  # in each phase


@attrs.frozen
class Scene:
    """A booted guest on the top of a chain, and its disk as it was before."""

    vm: Qemu
    folder: Path
    serial: Path
    workload: Workload
    before: Path

    @property
    def top(self) -> Path:
        return self.folder / "snap2"

    @property
    def copy(self) -> Path:
        return self.folder / "copy"

    async def more_writes(self) -> int:
        """Let the guest write on; return the last write that it knows to be stable."""
        return await until_acknowledged(self.serial, acknowledged(self.serial) + WRITES)

    async def flat(self, image: Path) -> Path:
        tool = sibling(self.vm.binary, "qemu-img")
        raw = self.folder / f"{image.name}.flat"
        return await asyncio.to_thread(flatten, image, raw, qemu_img=tool)

    async def check_runs_on(self, image: Path) -> None:
        """End QEMU as a power cut would; the image must have all that the guest was told."""
        await self.more_writes()
        await asyncio.to_thread(self.vm.kill)
        last = acknowledged(self.serial)
        assert errors(self.serial) == []
        flat = await self.flat(image)
        report = check_image(flat, self.workload, acknowledged=last, base=self.before)
        assert report.problems == ()
        assert report.state >= last

    async def check_instant(self, image: Path, before: int, after: int) -> None:
        """An image must be the guest's disk at one instant between two writes."""
        flat = await self.flat(image)
        report = check_point_in_time(
            flat, self.workload, before=before, after=after, base=self.before
        )
        assert report.problems == ()


def make_chain(images: ImageTools, folder: Path) -> None:
    """Data of all layers under, inside, and beside the guest's region."""
    below = None
    for number, name in enumerate(("base", "snap1", "snap2")):
        images.create(folder / name, SIZE, backing=below)
        start = 4 * number
        images.io(folder / name, f"write -P {0xB0 + number:#x} {start}M {30 - 8 * number}M")
        below = folder / name


@pytest.fixture
async def scene(
    qemu: QemuFactory, images: ImageTools, tmp_path: Path, request: pytest.FixtureRequest
) -> Scene:
    options: dict[str, Any] = getattr(request, "param", {})
    workload = Workload(block_size=512, start=16384, blocks=8192, delay=1000, **options)
    make_chain(images, tmp_path)
    tool = sibling(images.qemu, "qemu-img")
    before = await asyncio.to_thread(
        flatten, tmp_path / "snap2", tmp_path / "before.flat", qemu_img=tool
    )
    serial = tmp_path / "serial"
    vm = qemu(
        *("-m", "128", "-drive", f"if=virtio,format=qcow2,file={tmp_path / 'snap2'}"),
        *Guest.find().arguments(serial=serial, workload=workload),
        machine="pc",
        name=None,
    )
    await asyncio.to_thread(vm.start)
    await until_acknowledged(serial, WRITES)
    return Scene(vm, tmp_path, serial, workload, before)


async def through_the_phases(scene: Scene, copy: Copy) -> None:
    """Let the guest write while the copy starts, copies, and mirrors."""
    await scene.more_writes()
    assert copy.phase is Phase.COPYING
    await copy.set_bandwidth(0)
    await copy.ready()
    await scene.more_writes()
    assert not copy.job.life.concluded


WAYS = [
    pytest.param({"shallow": True}, id="shallow"),
    pytest.param({"shallow": False}, id="full"),
    pytest.param({"shallow": True, "synchronous_writes": True}, id="shallow-synchronous"),
    pytest.param({"shallow": False, "format": "raw"}, id="full-raw"),
    pytest.param({"shallow": True, "via": "drive-mirror"}, id="shallow-drive-mirror"),
]


@pytest.mark.parametrize("way", WAYS)
async def test_pivot_loses_nothing_that_the_guest_was_told_is_stable(
    scene: Scene, way: dict[str, Any]
) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, bandwidth=SLOW, **way)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.pivot()
        after = acknowledged(scene.serial)
        assert result.outcome is Phase.PIVOTED
        assert result.active == str(scene.copy)
    await scene.check_runs_on(scene.copy)
    await scene.check_instant(scene.top, before, after)


@pytest.mark.parametrize("way", WAYS)
async def test_finish_is_the_guests_disk_at_one_instant(scene: Scene, way: dict[str, Any]) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, bandwidth=SLOW, **way)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.finish()
        after = acknowledged(scene.serial)
        assert result.outcome is Phase.FINISHED
    await scene.check_instant(scene.copy, before, after)
    await scene.check_runs_on(scene.top)


async def test_abort_while_mirroring_leaves_a_consistent_copy(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, shallow=True, bandwidth=SLOW)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.abort()
        after = acknowledged(scene.serial)
        assert (result.outcome, result.consistent) == (Phase.ABORTED, True)
    await scene.check_instant(scene.copy, before, after)
    await scene.check_runs_on(scene.top)


async def test_abort_while_copying_leaves_no_trace(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        nodes = set((await machine.graph()).nodes)
        copy = await machine.blockcopy("vda", scene.copy, shallow=True, bandwidth=SLOW)
        await scene.more_writes()
        result = await copy.abort()
        assert (result.outcome, result.consistent) == (Phase.ABORTED, False)
        assert set((await machine.graph()).nodes) == nodes
    assert not scene.copy.exists()
    await scene.check_runs_on(scene.top)


async def test_pivot_again_and_again_under_load(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        for turn in range(5):
            destination = scene.folder / f"copy{turn}"
            copy = await machine.blockcopy("vda", destination, shallow=True)
            await copy.ready()
            await copy.pivot()
            await until_acknowledged(scene.serial, acknowledged(scene.serial) + 20)
    await scene.check_runs_on(scene.folder / "copy4")
