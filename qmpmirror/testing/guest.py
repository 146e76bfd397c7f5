# SPDX-License-Identifier: MIT
"""A tiny Linux guest that writes numbered blocks, and the proof that none of them was lost.

`scripts/guest` builds the guest; its init, `scripts/guest-init.c`, is this module's other half.
Writes 1, 2, 3, ... each go to every disk in turn, each is on stable storage before the next begins,
and is then acknowledged on the serial port. So at every instant a disk holds exactly what the first
so many writes left there, and an image of it can be judged block by block::

    workload = Workload(blocks=1024)
    arguments = Guest.find().arguments(serial=log, workload=workload)  # and a disk for QEMU
    ...
    report = check_image(flatten(copy, raw), workload, acknowledged=acknowledged(log))
    assert report.problems == ()
"""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
import time
import zlib
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs

from qmpmirror.testing.images import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# As in guest-init.c.
_MAGIC = b"qmpmblk1"
_HEADER = struct.Struct("<8sQQQII")  # magic, number, offset, run, disk, block size
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1

_SECTOR = 512
_CHUNK = 64 * 1024
_DEFAULT_DIRECTORY = Path(__file__).parents[2] / ".cache" / "guest"
_ACK = re.compile(rb"^ack (\d+) (\d+)\r?\n", re.MULTILINE)
_ERROR = re.compile(rb"^(?:error|corrupt|fatal) .*|^.*Kernel panic.*", re.MULTILINE)


def _power_of_two(minimum: int) -> Callable[[Any, attrs.Attribute[int], int], None]:
    def validate(_: Any, attribute: attrs.Attribute[int], value: int) -> None:
        if value < minimum or value & (value - 1):
            raise ValueError(f"{attribute.name} is no power of two from {minimum} on: {value}")

    return validate


def _mix(x: int) -> int:
    """Finalize splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


@attrs.frozen(kw_only=True)
class Workload:
    """What the guest writes and where, for the guest's command line and for the checks alike.

    The blocks of a region are overwritten in pass after pass, each in another pseudo-random order.

    Attributes:
        block_size: Bytes of a block, a power of two from 512 on.
        start: Where the region begins, in blocks of this size.
        blocks: How many blocks it has, a power of two.
        count: How many writes; 0 is for ever.
        ack_every: Only every so many writes are acknowledged, when the log would grow too much.
        verify: An earlier block is read back after every so many writes; 0 is never.
        delay: Microseconds between two writes.
        run: Tells this boot's blocks from another one's on the same disk.
        power_off: Power off after `count` writes instead of idling.
    """

    block_size: int = attrs.field(default=4096, validator=_power_of_two(_SECTOR))
    start: int = 0
    blocks: int = attrs.field(default=1024, validator=_power_of_two(1))
    count: int = 0
    ack_every: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    verify: int = 64
    delay: int = 0
    run: int = 1
    power_off: bool = False

    def slot(self, number: int) -> int:
        """Which block of the region a write goes to."""
        key = _mix((number - 1) // self.blocks + _GOLDEN & _WORD)
        mask = self.blocks - 1
        slot = ((number - 1) ^ key) * (key >> 32 | 1) & mask
        slot ^= slot >> (mask.bit_length() // 2 + 1)
        return slot * _GOLDEN & mask

    def offset(self, slot: int) -> int:
        """Where on the disk a block of the region begins, in bytes."""
        return (self.start + slot) * self.block_size

    def newest(self, number: int) -> list[int]:
        """By slot: the last of the first `number` writes that went there, 0 for none."""
        newest = [0] * self.blocks
        for each in range(max(1, number - 2 * self.blocks + 1), number + 1):
            newest[self.slot(each)] = each
        return newest

    def block(self, number: int, disk: int = 0) -> bytes:
        """Make the block that the guest writes."""
        offset = self.offset(self.slot(number))
        header = _HEADER.pack(_MAGIC, number, offset, self.run, disk, self.block_size)
        seed = (number << 8 | disk) * _GOLDEN
        words = range(_HEADER.size // 8, self.block_size // 8 - 1)
        fill = struct.pack(f"<{len(words)}Q", *((seed + word) & _WORD for word in words))
        return header + fill + struct.pack("<Q", zlib.crc32(header + fill))

    def command_line(self, disks: Sequence[str] = ("vda",)) -> str:
        """Give the kernel's command line, for the disks under their names in the guest."""
        options = {
            "disks": ",".join(disks),
            "bs": self.block_size,
            "start": self.start,
            "blocks": self.blocks,
            "count": self.count,
            "ackevery": self.ack_every,
            "verify": self.verify,
            "delay": self.delay,
            "run": self.run,
            "end": "poweroff" if self.power_off else "idle",
        }
        # Under TCG on a busy host the kernel's timer check can fail, which is a panic.
        kernel = "console=ttyS0 quiet loglevel=1 no_timer_check tsc=reliable"
        return " ".join([kernel, *(f"qmpm.{name}={value}" for name, value in options.items())])


_DEFAULT_WORKLOAD = Workload()


@attrs.frozen
class Guest:
    """The guest's kernel and initrd.

    Attributes:
        kernel: The kernel's image.
        initrd: The compressed initial file system with the init.
    """

    kernel: Path
    initrd: Path

    @classmethod
    def find(cls, directory: Path | None = None) -> Guest:
        """Find the guest that `scripts/guest` has built.

        Args:
            directory: Where it is; without it ``$QMPMIRROR_GUEST_DIR``, else the script's default.

        Raises:
            FileNotFoundError: It is not there.
        """
        where = directory or Path(os.environ.get("QMPMIRROR_GUEST_DIR") or _DEFAULT_DIRECTORY)
        guest = cls(where / "vmlinuz", where / "initrd.cpio.gz")
        if not (guest.kernel.exists() and guest.initrd.exists()):
            raise FileNotFoundError(f"no guest in {where}: run scripts/guest")
        return guest

    def arguments(
        self,
        *,
        serial: Path,
        workload: Workload = _DEFAULT_WORKLOAD,
        disks: Sequence[str] = ("vda",),
    ) -> list[str]:
        """Give QEMU's options for booting the guest; the disks' are up to the caller.

        Args:
            serial: The file for the log of the serial port.
            workload: What the guest shall do.
            disks: By name in the guest: ``vda``, ... in the order of PCI slots, or ``sda``, ...
        """
        boot = ["-kernel", str(self.kernel), "-initrd", str(self.initrd)]
        return [*boot, "-append", workload.command_line(disks), "-serial", f"file:{serial}"]


def _last_ack(serial_log: Path) -> tuple[int, int]:
    content = serial_log.read_bytes()
    for part in (content[-_CHUNK:], content):
        if acks := _ACK.findall(part):
            return int(acks[-1][0]), int(acks[-1][1])
    return 0, 0


def acknowledged(serial_log: Path) -> int:
    """Number of the last write that the guest knows to be stable; 0 before the first."""
    return _last_ack(serial_log)[0]


def longest_write(serial_log: Path) -> int:
    """How long the guest waited for its slowest write so far, in microseconds of its own clock."""
    return _last_ack(serial_log)[1]


def errors(serial_log: Path) -> list[str]:
    """What the guest complains about: failed I/O, wrong blocks read back, its own end."""
    return [line.decode(errors="replace") for line in _ERROR.findall(serial_log.read_bytes())]


async def until_acknowledged(serial_log: Path, number: int, *, timeout: float = 60.0) -> int:
    """Wait until the guest has acknowledged a write, for at most `timeout` seconds.

    Returns:
        The last acknowledged write, which may be a later one.

    Raises:
        TimeoutError: It did not come, or never will; with what the guest complains about.
    """
    end = time.monotonic() + timeout
    while (last := acknowledged(serial_log)) < number:
        complaints = errors(serial_log)
        dead = complaints and not complaints[-1].startswith(("error", "corrupt"))
        if dead or time.monotonic() > end:
            raise TimeoutError(f"write {number} is not acknowledged, only {last}: {complaints}")
        await asyncio.sleep(0.05)
    return last


def flatten(image: Path | str, raw: Path, *, qemu_img: Path | str = "qemu-img") -> Path:
    """Convert an image with all of its backing chain to a raw one, even while a QEMU uses it.

    Returns:
        `raw`, the file that was made.

    Raises:
        ImageError: qemu-img failed.
    """
    words = [qemu_img, "convert", "-U", "-O", "raw", image, raw]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise ImageError(f"cannot flatten {image}: {done.stderr.decode().strip()}")
    return raw


@attrs.frozen
class Report:
    """What an image holds of the guest's writes.

    Attributes:
        image: The image.
        state: The newest write that it may hold and does; of a point in time, the last before it.
        problems: All that is wrong, in words; each begins with its kind. ``lost``: a block holds an
            older write than it must, or none. ``torn``: it is no whole block. ``future``: it holds
            a newer write than it can. ``foreign``: it belongs elsewhere, or what the guest never
            wrote has changed.
    """

    image: Path
    state: int
    problems: tuple[str, ...]


def _origin(data: bytes, before: bytes, sector: int) -> str:
    """Tell where a sector of a broken block comes from: its fill says it."""
    begin = sector * _SECTOR
    content = data[begin : begin + _SECTOR]
    skipped = 0 if sector else _HEADER.size
    fill = struct.unpack_from(f"<{(_SECTOR - skipped) // 8 - 1}Q", content, skipped)
    seed = fill[0] - (begin + skipped) // 8
    number, disk = divmod(seed * pow(_GOLDEN, -1, 2**64) & _WORD, 256)
    if not any(content):
        return "zeros"
    if content == before[begin : begin + _SECTOR]:
        return "what was there before"
    if all(word == (fill[0] + step) & _WORD for step, word in enumerate(fill)):
        return f"write {number} of disk {disk}"
    return "unknown data"


def _sectors(data: bytes, before: bytes) -> str:
    """Describe a broken block, neighbours of one origin together."""
    parts = []
    sectors = range(len(data) // _SECTOR)
    for origin, group in groupby(sectors, lambda sector: _origin(data, before, sector)):
        run = list(group)
        parts.append(f"sectors {run[0]}-{run[-1]} {origin}")
    return ", ".join(parts)


def _examine(work: Workload, slot: int, disk: int, data: bytes, before: bytes) -> tuple[int, str]:
    """Tell which write a block holds (0 for none), or what is wrong with it."""
    magic, number, *place = _HEADER.unpack_from(data)
    expected_place = [work.offset(slot), work.run, disk, work.block_size]
    whole = magic == _MAGIC and data[-8:] == struct.pack("<Q", zlib.crc32(data[:-8]))
    if whole and place == expected_place and work.slot(number) == slot:
        return number, ""
    if data == before:
        return 0, ""
    where = f"slot {slot} at {work.offset(slot):#x}"
    if whole:
        theirs = "offset {:#x} in run {} on disk {}, size {}".format(*place)
        return 0, f"foreign: {where} holds write {number} for {theirs}"
    return 0, f"torn: {where} is no whole block: {_sectors(data, before)}"


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Read what is there, and zeros where there is nothing."""
    file.seek(offset)
    return file.read(length).ljust(length, b"\0")


def _changes_outside(image: BinaryIO, base: BinaryIO, workload: Workload) -> Iterator[str]:
    """Compare what the guest never writes to."""
    end = max(file.seek(0, os.SEEK_END) for file in (image, base))
    for begin, until in ((0, workload.offset(0)), (workload.offset(workload.blocks), end)):
        for offset in range(begin, until, _CHUNK):
            length = min(_CHUNK, until - offset)
            if _read_at(image, offset, length) != _read_at(base, offset, length):
                yield f"foreign: {offset:#x} to {offset + length:#x} differs from the base"


def _judge(where: str, number: int, expected: int, high: int) -> str:
    if number > high:
        return f"future: {where} holds write {number}, but none after {high} was made"
    if number < expected:
        holds = f"write {number}" if number else "what was there before"
        return f"lost: {where} holds {holds}, but must hold write {expected}"
    return ""


def _check(
    image: Path, work: Workload, *, disk: int, base: Path | None, low: int, high: int, exact: bool
) -> Report:
    size = work.block_size
    offsets = [work.offset(slot) for slot in range(work.blocks)]
    with image.open("rb") as ours, (base or Path(os.devnull)).open("rb") as theirs:
        found = [
            _examine(work, slot, disk, _read_at(ours, at, size), _read_at(theirs, at, size))
            for slot, at in enumerate(offsets)
        ]
        outside = list(_changes_outside(ours, theirs, work)) if base else []
    state = max((number for number, _ in found if number <= high), default=0)
    expected = work.newest(max(low, state) if exact else low)
    problems = [
        wrong or _judge(f"slot {slot} at {offsets[slot]:#x}", number, expected[slot], high)
        for slot, (number, wrong) in enumerate(found)
    ]
    return Report(image, state, tuple(filter(None, problems + outside)))


def check_image(
    image: Path,
    workload: Workload,
    *,
    acknowledged: int,
    upper: int | None = None,
    disk: int = 0,
    base: Path | None = None,
) -> Report:
    """Check that an image has every acknowledged write, and nothing that was never written.

    Args:
        image: A raw image. It may have been read while the guest went on.
        workload: What the guest was told to do.
        acknowledged: The last acknowledged write before the image was read.
        upper: The last write that can be in it: without it, `acknowledged` and those after it that
            no acknowledgement tells of yet.
        disk: The disk's place among the guest's.
        base: A raw image of the disk before the guest: what the guest did not write must be as
            there, also outside of the region. Without it, the region must be zero there.
    """
    high = acknowledged + workload.ack_every if upper is None else upper
    return _check(image, workload, disk=disk, base=base, low=acknowledged, high=high, exact=False)


def check_point_in_time(
    image: Path,
    workload: Workload,
    *,
    before: int,
    after: int,
    disk: int = 0,
    base: Path | None = None,
) -> Report:
    """Check that an image is the disk of one instant: all writes up to one, none after it.

    That one is the report's `state`. For disks cut at one instant it is equal, or 1 less from some
    disk (in the guest's order) on.

    Args:
        image: A raw image. A disk whose QEMU was killed is one, as is a finished copy.
        workload: What the guest was told to do.
        before: The last acknowledged write at some time before the instant.
        after: The last acknowledged write at some time after it; one more can have been on its way.
        disk: As for `check_image`.
        base: As for `check_image`.
    """
    high = after + workload.ack_every
    return _check(image, workload, disk=disk, base=base, low=before, high=high, exact=True)
