# SPDX-License-Identifier: MIT
"""A guest writes the same number to its disks in turn, synchronously and without pause.

Copies that are ended at one instant hold, for every disk but the first, either the number of the
disk before it or one less.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
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
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


@pytest.fixture
async def scene(
    qemu: QemuFactory, images: ImageTools, tmp_path: Path, request: pytest.FixtureRequest
) -> Scene:
    count: int = getattr(request, "param", 2)
    arguments: list[str] = []
    for number in range(count):
        base, top = tmp_path / f"base{number}", tmp_path / f"top{number}"
        images.create(base, SIZE)
        images.create(top, SIZE, backing=base)
        drive = f"if=none,id=d{number},format=qcow2,file={top}"
        device = f"virtio-blk-pci,drive=d{number},id=vd{number}"
        arguments += ["-drive", drive, "-device", device]
    letters = [f"vd{chr(ord('a') + number)}" for number in range(count)]
    guest = Guest.find().arguments(serial=tmp_path / "serial", workload=WORK, disks=letters)
    vm = qemu("-m", "128", *arguments, *guest, machine="pc", name=None)
    await asyncio.to_thread(vm.start)
    made = Scene(vm, tmp_path, count)
    await until_acknowledged(made.serial, 50)
    return made


async def check_one_instant(
    scene: Scene, copies: Sequence[Path | str], before: int, after: int
) -> None:
    numbers = []
    for number, copy in enumerate(copies):
        flat = await scene.flat(Path(copy))
        report = check_point_in_time(flat, WORK, before=before, after=after, disk=number)
        assert report.problems == ()
        numbers.append(report.state)
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] - numbers[-1] <= 1


@pytest.fixture
def slow_server(images: ImageTools, tmp_path: Path) -> Iterator[str]:
    """An NBD server that takes 4 MiB a second."""
    image = images.create(tmp_path / "served", SIZE, fmt="raw")
    path, pid = tmp_path / "nbd", tmp_path / "nbd-pid"
    command = [
        sibling(images.qemu, "qemu-nbd"),
        *("--object", "throttle-group,id=slow,x-bps-write=4194304"),
        "--image-opts",
        f"driver=throttle,throttle-group=slow,file.driver=file,file.filename={image}",
        *("--persistent", f"--socket={path}", f"--pid-file={pid}"),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
        until(pid.exists)
        yield f"nbd+unix:///?socket={path}"
        server.terminate()


async def finish(scene: Scene, members: list[Member]) -> None:
    """End a group, and prove that it is one instant."""
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        group = await machine.blockcopy_group(members, max_freeze=30)
        assert await group.ready()
        await until_acknowledged(scene.serial, acknowledged(scene.serial) + 20)
        before = acknowledged(scene.serial)
        result = await group.finish()
        after = acknowledged(scene.serial)
    assert result.outcome is Phase.FINISHED
    assert len(result.cuts) == scene.disks
    assert all(cut.pending <= cut.finalized for cut in result.cuts)
    served = scene.folder / "served"
    copies = [served if m.destination.startswith("nbd") else m.destination for m in members]
    await check_one_instant(scene, copies, before, after)
    assert errors(scene.serial) == []


@pytest.mark.parametrize("scene", [2, 4], indirect=True)
async def test_finish_is_one_instant_on_all_disks(scene: Scene) -> None:
    for turn in range(3):
        await finish(scene, scene.members(turn))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("scene", "cuts"), [(2, 20), (4, 20), (8, 20)], indirect=["scene"])
async def test_finish_is_one_instant_every_time(scene: Scene, cuts: int) -> None:
    for turn in range(cuts):
        await finish(scene, scene.members(turn))
        for number in range(scene.disks):
            scene.copy(turn, number).unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_one_disk_with_a_slow_destination(scene: Scene, slow_server: str) -> None:
    first, second = scene.members(0)
    # Before QEMU 8.2 nothing else would let it catch up with the guest.
    far = Member(second.disk, slow_server, Options(format="raw", synchronous_writes=True))
    await finish(scene, [first, far])


@pytest.mark.parametrize("scene", [2, 4], indirect=True)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("scene", "times"), [(2, 20), (4, 20), (8, 20)], indirect=["scene"])
async def test_pivot_is_one_instant_every_time(scene: Scene, times: int) -> None:
    for turn in range(times):
        old = [await _active(scene, number) for number in range(scene.disks)]
        members = [Member(m.disk, m.destination) for m in scene.members(turn)]
        async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
            group = await machine.blockcopy_group(members, max_freeze=30)
            await group.ready()
            before = acknowledged(scene.serial)
            result = await group.pivot()
            after = acknowledged(scene.serial)
        assert result.outcome is Phase.PIVOTED
        await until_acknowledged(scene.serial, after + 20)
        assert errors(scene.serial) == []
        # What the guest left behind is one instant, and what it writes to now has all since then.
        await check_one_instant(scene, old, before, after)
        for image in old:
            image.unlink()
    await asyncio.to_thread(scene.vm.kill)
    last = acknowledged(scene.serial)
    for number in range(scene.disks):
        image = await scene.flat(scene.copy(times - 1, number))
        assert check_image(image, WORK, acknowledged=last, disk=number).problems == ()


async def _active(scene: Scene, number: int) -> Path:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        return Path((await machine.disk(f"vd{number}")).path)
