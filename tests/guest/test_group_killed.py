# SPDX-License-Identifier: MIT
"""The client of a group dies, or is cut off, at every single QMP command of a pivot or finish.

A real guest writes to both disks all the while. After each time no disk may stand still, nothing of
ours may be left, and either both disks were switched or copied at one instant, or none.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import Way
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
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

CLIENT = Path(__file__).with_name("interrupted_client.py")
SIZE = 8 * 1024 * 1024
KILLED = -9
CUT_OFF = 6
WORK = Workload(block_size=512, start=4096, blocks=1024, delay=1500, verify=8)


@attrs.frozen
class Scene:
    """A booted guest with two disks."""

    vm: Qemu
    folder: Path

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def copies(self, turn: int) -> list[Path]:
        return [self.folder / f"copy{turn}-{number}" for number in (0, 1)]

    def active(self) -> list[Path]:
        drives = {d["qdev"].split("/")[3]: d for d in self.vm.execute("query-block") if "qdev" in d}
        images = [drives[name]["inserted"]["image"]["filename"] for name in ("vd0", "vd1")]
        return [Path(image) for image in images]

    async def flat(self, image: Path) -> Path:
        tool = sibling(self.vm.binary, "qemu-img")
        return await asyncio.to_thread(flatten, image, self.folder / "flat", qemu_img=tool)


@pytest.fixture
async def scene(qemu: QemuFactory, images: ImageTools, tmp_path: Path) -> Scene:
    words: list[str] = []
    for number in (0, 1):
        top = images.create(tmp_path / f"top{number}", SIZE)
        words += ["-drive", f"if=none,id=d{number},format=qcow2,file={top}"]
        words += ["-device", f"virtio-blk-pci,drive=d{number},id=vd{number}"]
    guest = Guest.find().arguments(serial=tmp_path / "serial", workload=WORK, disks=["vda", "vdb"])
    vm = qemu("-m", "128", *words, *guest, machine="pc", name=None)
    await asyncio.to_thread(vm.start)
    made = Scene(vm, tmp_path)
    await until_acknowledged(made.serial, 10)
    return made


async def run_client(scene: Scene, turn: int, ending: str, how: str) -> tuple[bool, str]:
    """Run the command line; whether it was interrupted, and the last command that it got to."""
    number, moment = divmod(turn, 2)
    log = scene.folder / "log"
    log.unlink(missing_ok=True)
    specs = [f"--diskspec=vd{n},dest={copy}" for n, copy in enumerate(scene.copies(turn))]
    words = ["blockcopy", str(scene.vm.qmp), *specs, f"--{ending}", "--max-freeze", "60000"]
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, CLIENT, str(number), how, ("before", "after")[moment], log, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
        text=True,
    )
    assert run.returncode in {KILLED, CUT_OFF, 0}, run.stderr
    return run.returncode != 0, log.read_text().splitlines()[-1]


async def check_copies(scene: Scene, images: list[Path], before: int, after: int) -> None:
    states = []
    for disk, image in enumerate(images):
        flat = await scene.flat(image)
        report = check_point_in_time(flat, WORK, before=before, after=after, disk=disk)
        assert report.problems == ()
        states.append(report.state)
    assert 0 <= states[0] - states[1] <= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", [Way.FINISH, Way.UNDO], ids=lambda way: way.value)
@pytest.mark.parametrize("how", ["kill", "cut"])
@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_every_command_may_be_the_clients_last(
    scene: Scene, ending: str, how: str, way: Way, record_property: Any
) -> None:
    turn, interrupted = 0, True
    old: list[Path] = []
    while interrupted:
        before, old = acknowledged(scene.serial), scene.active()
        interrupted, command = await run_client(scene, turn, ending, how)
        # A disk that stands still would stop the guest: the watchdog comes before recover.
        running = acknowledged(scene.serial)
        try:
            async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
                findings = await machine.recover(way)
                assert await machine.recover() == []
        except qmpmirror.Error as error:
            where = f"turn {turn}, {how} at {command}, {scene.vm.returncode}: {scene.vm.tail()}"
            raise AssertionError(where) from error
        after = acknowledged(scene.serial)
        try:
            await until_acknowledged(scene.serial, after + 10)
            assert running <= after
            assert errors(scene.serial) == []
            assert scene.vm.execute("query-jobs") == []
            copies, now = scene.copies(turn), scene.active()
            assert now in (old, copies)
            there = [copy for copy in copies if copy.exists()]
            if now == copies:
                await check_copies(scene, old, before, after)
            elif len(there) == 2:
                await check_copies(scene, copies, before, after)
            else:
                assert there == []
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"turn {turn}, {how} at {command}: {findings}") from error
        turn += interrupted
    record_property("boundaries", turn)
    await asyncio.to_thread(scene.vm.kill)
    last = acknowledged(scene.serial)
    for disk, image in enumerate(scene.copies(turn) if ending == "pivot" else old):
        report = check_image(await scene.flat(image), WORK, acknowledged=last, disk=disk)
        assert report.problems == ()
    sys.stdout.write(f"all {turn} boundaries were tried\n")
