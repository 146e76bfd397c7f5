# SPDX-License-Identifier: MIT
"""A guest writes the same number to its disks in turn, synchronously and without pause.

Copies that are ended at one instant hold, for every disk but the first, either the number of the
disk before it or one less.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs
import pytest

import qmpmirror
from qmpmirror import Member, Phase
from qmpmirror.operations.options import Options
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

    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

SIZE = 16 * 1024 * 1024
WORK = Workload(block_size=4096, start=512, blocks=512, delay=300)


@attrs.frozen
class Scene:
    """A booted guest that writes to several disks."""

    vm: Qemu
    folder: Path
    disks: int

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def members(self, turn: int) -> list[Member]:
        return [
            Member(f"vd{number}", str(self.copy(turn, number)), Options(shallow=number % 2 == 0))
            for number in range(self.disks)
        ]

    def copy(self, turn: int, number: int) -> Path:
        return self.folder / f"copy{turn}-{number}"

    async def flat(self, image: Path) -> Path:
        tool = sibling(self.vm.binary, "qemu-img")
        return await asyncio.to_thread(flatten, image, self.folder / "flat", qemu_img=tool)


@pytest.fixture(params=[2, 4])
async def scene(
    qemu: QemuFactory, images: ImageTools, tmp_path: Path, request: pytest.FixtureRequest
) -> Scene:
    arguments: list[str] = []
    for number in range(request.param):
        base, top = tmp_path / f"base{number}", tmp_path / f"top{number}"
        images.create(base, SIZE)
        images.create(top, SIZE, backing=base)
        drive = f"if=none,id=d{number},format=qcow2,file={top}"
        device = f"virtio-blk-pci,drive=d{number},id=vd{number}"
        arguments += ["-drive", drive, "-device", device]
    letters = [f"vd{chr(ord('a') + number)}" for number in range(request.param)]
    guest = Guest.find().arguments(serial=tmp_path / "serial", workload=WORK, disks=letters)
    vm = qemu("-m", "128", *arguments, *guest, machine="pc", name=None)
    await asyncio.to_thread(vm.start)
    made = Scene(vm, tmp_path, request.param)
    await until_acknowledged(made.serial, 50)
    return made


async def check_one_instant(scene: Scene, turn: int, before: int, after: int) -> None:
    numbers = []
    for number in range(scene.disks):
        flat = await scene.flat(scene.copy(turn, number))
        report = check_point_in_time(flat, WORK, before=before, after=after, disk=number)
        assert report.problems == ()
        numbers.append(report.state)
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] - numbers[-1] <= 1


async def test_finish_is_one_instant_on_all_disks(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        for turn in range(5):
            group = await machine.blockcopy_group(scene.members(turn), max_freeze=5)
            assert await group.ready()
            await until_acknowledged(scene.serial, acknowledged(scene.serial) + 20)
            before = acknowledged(scene.serial)
            result = await group.finish()
            after = acknowledged(scene.serial)
            assert result.outcome is Phase.FINISHED
            assert len(result.cuts) == scene.disks
            assert all(cut.pending <= cut.finalized for cut in result.cuts)
            await check_one_instant(scene, turn, before, after)
    assert errors(scene.serial) == []


async def test_pivot_moves_all_disks_at_one_instant(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        group = await machine.blockcopy_group(scene.members(0), max_freeze=5)
        await group.ready()
        before = acknowledged(scene.serial)
        result = await group.pivot()
        after = acknowledged(scene.serial)
        assert result.outcome is Phase.PIVOTED
    await until_acknowledged(scene.serial, after + 100)
    await asyncio.to_thread(scene.vm.kill)
    last = acknowledged(scene.serial)
    assert errors(scene.serial) == []
    states = []
    for number in range(scene.disks):
        report = check_image(
            await scene.flat(scene.copy(0, number)), WORK, acknowledged=last, disk=number
        )
        assert report.problems == ()
        old = await scene.flat(scene.folder / f"top{number}")
        frozen = check_point_in_time(old, WORK, before=before, after=after, disk=number)
        assert frozen.problems == ()
        states.append(frozen.state)
    assert states == sorted(states, reverse=True)
    assert states[0] - states[-1] <= 1
