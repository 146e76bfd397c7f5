# SPDX-License-Identifier: MIT
"""A real Linux guest on the top of a chain, which writes numbered, checksummed blocks."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import attrs
import pytest

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

SIZE = 64 * 1024 * 1024
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

    def rebase(self, image: Path, backing: Path) -> None:
        """Let the header of an image name another backing file."""
        self._image_tool("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, image)

    def overlay(self, image: Path, backing: Path) -> None:
        """Make an empty image on a backing file."""
        self._image_tool("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, image)

    def _image_tool(self, *words: str | Path) -> None:
        tool = sibling(self.vm.binary, "qemu-img")
        subprocess.run([tool, *words], check=True, stdin=subprocess.DEVNULL)

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
