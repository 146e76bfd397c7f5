# SPDX-License-Identifier: MIT
"""A QEMU with several disks, each of another kind, for copies that are ended together."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import qmpmirror
from qmpmirror import Member
from qmpmirror.operations.options import Options
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from qmpmirror.operations.group import CopyGroup
    from qmpmirror.testing import ImageTools, Qemu
    from qmpmirror.testing.fake import FakeMonitor
    from tests.qemu.conftest import Boot

SIZE = 8 * 1024 * 1024
UNIT = 65536


@attrs.define
class Disks:
    """Disks ``vd0``, ``vd1``, ...; those with an even number are overlays, the others raw.

    The guest writes its pattern number ``n`` to the ``n``-th place of each.
    """

    vm: Qemu
    images: ImageTools
    folder: Path
    count: int
    _writes: int = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    @property
    def names(self) -> list[str]:
        return [f"vd{number}" for number in self]

    def top(self, number: int) -> Path:
        return self.folder / f"top{number}"

    def copy(self, number: int) -> Path:
        return self.folder / f"copy{number}"

    def fmt(self, number: int) -> str:
        return "raw" if number % 2 else "qcow2"

    def members(self, **options: Any) -> list[Member]:
        return [
            Member(
                f"vd{number}", str(self.copy(number)), Options(shallow=not number % 2, **options)
            )
            for number in self
        ]

    @property
    def active(self) -> list[Path]:
        """The image under each device."""
        drives = {drive["qdev"].split("/")[3]: drive for drive in self.vm.execute("query-block")}
        return [Path(drives[name]["inserted"]["image"]["filename"]) for name in self.names]

    def write(self, byte: int) -> None:
        """Let the guest write to each disk: it must not wait for anybody. 0 changes nothing."""
        place = (16 + self._writes) * UNIT if byte else 100 * UNIT
        for name in self.names:
            self.vm.io(name, f"write -P {byte} {place} {UNIT}")
        self._writes += bool(byte)

    def check_copy(self, number: int, *patterns: int | None) -> None:
        """The copy holds what the guest wrote, and what was there before; None is no write."""
        image, fmt = self.copy(number), self.fmt(number)
        self.images.verify_pattern(image, 0, UNIT, 0x10 + number, fmt)
        for place, byte in enumerate(patterns):
            self.images.verify_pattern(image, (16 + place) * UNIT, UNIT, byte or 0, fmt)

    def statuses(self) -> list[str]:
        return [job["status"] for job in self.vm.execute("query-jobs")]

    def copies(self) -> list[str]:
        """The jobs that copy, without those that create the files."""
        jobs = self.vm.execute("query-jobs")
        return [job["id"] for job in jobs if job["type"] == "mirror"]

    def until_pending(self, count: int) -> None:
        until(lambda: self.statuses().count("pending") >= count)


def make_disks(boot: Boot, images: ImageTools, folder: Path, count: int) -> Disks:
    folder = folder / "disks"
    folder.mkdir()
    words: list[str] = []
    for number in range(count):
        top = folder / f"top{number}"
        if number % 2:
            images.create(top, SIZE, fmt="raw")
            images.write_pattern(top, 0, 32 * UNIT, 0, "raw")
            images.write_pattern(top, 0, UNIT, 0x10 + number, "raw")
        else:
            base = images.create(folder / f"base{number}", SIZE)
            images.write_pattern(base, 0, UNIT, 0x10 + number)
            images.create(top, backing=base)
            # Allocated, so that a write of zeroes later on changes no file.
            images.write_pattern(top, 96 * UNIT, 8 * UNIT, 0)
        fmt = "raw" if number % 2 else "qcow2"
        if number % 4 < 2:
            node = f"driver={fmt},node-name=fmt{number},file.driver=file,file.filename={top}"
            words += ["-blockdev", node]
            words += ["-device", f"virtio-blk-pci,drive=fmt{number},id=vd{number}"]
        else:
            words += ["-drive", f"if=none,id=d{number},format={fmt},file={top}"]
            words += ["-device", f"virtio-blk-pci,drive=d{number},id=vd{number}"]
    return Disks(boot(*words), images, folder, count)


@asynccontextmanager
async def mirroring(
    disks: Disks, fake: FakeMonitor, max_freeze: float = 5.0
) -> AsyncIterator[CopyGroup]:
    """A group in the mirroring phase, behind a fake monitor."""
    async with fake, qmpmirror.connect(str(fake.path)) as machine:
        group = await machine.blockcopy_group(disks.members(), max_freeze=max_freeze)
        assert await group.ready()
        yield group
