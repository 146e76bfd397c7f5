# SPDX-License-Identifier: MIT
"""The checker of the guest's images, on images that are made here."""

from __future__ import annotations

import zlib
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
    longest_write,
    until_acknowledged,
)
from qmpmirror.testing.images import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WORK = Workload(blocks=16, start=2)
SIZE = 32 * WORK.block_size


@attrs.define
class Disk:
    """An image that the guest's writes are played onto."""

    path: Path
    work: Workload = WORK
    disk: int = 0

    def write(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.put(self.work.slot(number), self.work.block(number, self.disk))

    def put(self, slot: int, data: bytes, within: int = 0) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.work.offset(slot) + within)
            file.write(data)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return Disk(path)


def kinds(problems: Iterable[str]) -> list[str]:
    return [problem.partition(":")[0] for problem in problems]


@pytest.mark.parametrize("blocks", [1, 2, 8, 64, 1024])
def test_each_pass_writes_every_block_once(blocks: int) -> None:
    work = Workload(blocks=blocks)
    orders = [
        [work.slot(first + step) for step in range(blocks)]
        for first in (1, blocks + 1, 2 * blocks + 1)
    ]
    assert [sorted(order) for order in orders] == [list(range(blocks))] * 3
    if blocks >= 8:
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 40, 100])
def test_newest_is_the_last_write_of_each_slot(number: int) -> None:
    played = [0] * WORK.blocks
    for each in range(1, number + 1):
        played[WORK.slot(each)] = each
    assert WORK.newest(number) == played


@pytest.mark.parametrize(
    "wrong", [{"block_size": 256}, {"block_size": 1000}, {"blocks": 0}, {"blocks": 24}]
)
def test_what_the_guest_would_refuse_is_refused_here(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no power of two"):
        Workload(**wrong)


@pytest.mark.parametrize("last", [0, 1, 5, 16, 17, 100])
@pytest.mark.parametrize("block_size", [512, 4096, 65536])
def test_the_undisturbed_disk_has_no_problem(disk: Disk, last: int, block_size: int) -> None:
    disk.work = attrs.evolve(WORK, block_size=block_size)
    disk.write(range(1, last + 1))
    report = check_image(disk.path, disk.work, acknowledged=last)
    exact = check_point_in_time(disk.path, disk.work, before=last, after=last)
    assert (report.state, report.problems) == (last, ())
    assert (exact.state, exact.problems) == (last, ())


def test_the_write_in_flight_may_be_there(disk: Disk) -> None:
    disk.write(range(1, 42))
    report = check_image(disk.path, WORK, acknowledged=40)
    assert (report.state, report.problems) == (41, ())
    assert check_point_in_time(disk.path, WORK, before=40, after=40).state == 41


def test_a_lost_first_write(disk: Disk) -> None:
    disk.write([1, 2, 4, 5])
    slot = WORK.slot(3)
    (problem,) = check_image(disk.path, WORK, acknowledged=5).problems
    assert problem == (
        f"lost: slot {slot} at {WORK.offset(slot):#x} holds what was there before, "
        "but must hold write 3"
    )


def test_a_stale_block(disk: Disk) -> None:
    disk.write(range(1, 41))
    slot = WORK.slot(38)
    stale = WORK.newest(37)[slot]
    disk.write([stale])
    report = check_image(disk.path, WORK, acknowledged=40)
    assert report.problems == (
        f"lost: slot {slot} at {WORK.offset(slot):#x} holds write {stale}, but must hold write 38",
    )


def test_a_block_that_is_stale_by_one_write(disk: Disk) -> None:
    disk.work = attrs.evolve(WORK, blocks=1)
    disk.write([1])
    assert kinds(check_image(disk.path, disk.work, acknowledged=2).problems) == ["lost"]


def test_an_old_image_lacks_all_that_came_after_it(disk: Disk) -> None:
    disk.write(range(1, 31))
    report = check_image(disk.path, WORK, acknowledged=40)
    changed = [a != b for a, b in zip(WORK.newest(30), WORK.newest(40), strict=True)]
    assert kinds(report.problems) == ["lost"] * sum(changed)
    assert report.state == 30


def test_a_torn_block_tells_its_parts(disk: Disk) -> None:
    disk.write(range(1, 41))
    slot = WORK.slot(40)
    old = WORK.newest(39)[slot]
    disk.put(slot, WORK.block(old)[1024:2048], within=1024)
    disk.put(slot, bytes(512), within=2048)
    (problem,) = check_image(disk.path, WORK, acknowledged=40).problems
    assert problem == (
        f"torn: slot {slot} at {WORK.offset(slot):#x} is no whole block: "
        f"sectors 0-1 write 40 of disk 0, sectors 2-3 write {old} of disk 0, "
        "sectors 4-4 zeros, sectors 5-7 write 40 of disk 0"
    )


@pytest.mark.parametrize("at", [0, 8, 39, 40, 511, 512, 4087, 4088, 4095])
def test_no_changed_byte_goes_unseen(disk: Disk, at: int) -> None:
    disk.write([1])
    disk.put(WORK.slot(1), bytes([WORK.block(1)[at] ^ 1]), within=at)
    assert kinds(check_image(disk.path, WORK, acknowledged=1).problems) == ["torn"]


def test_a_torn_write_in_flight_is_no_excuse(disk: Disk) -> None:
    disk.write(range(1, 41))
    disk.put(WORK.slot(41), WORK.block(41)[:512])
    assert kinds(check_image(disk.path, WORK, acknowledged=40).problems) == ["torn"]


def test_a_write_from_the_future(disk: Disk) -> None:
    disk.write([*range(1, 41), 43])
    slot = WORK.slot(43)
    report = check_image(disk.path, WORK, acknowledged=40)
    assert report.state == 40
    assert report.problems == (
        f"future: slot {slot} at {WORK.offset(slot):#x} holds write 43, but none after 41 was made",
    )


def test_a_running_guests_image_may_be_smeared_up_to_the_upper_write(disk: Disk) -> None:
    disk.write([*range(1, 41), 43])
    assert check_image(disk.path, WORK, acknowledged=40, upper=43).problems == ()
    assert kinds(check_image(disk.path, WORK, acknowledged=40, upper=42).problems) == ["future"]


def test_reordered_writes_are_no_point_in_time(disk: Disk) -> None:
    disk.write([*range(1, 41), 43])
    report = check_point_in_time(disk.path, WORK, before=35, after=50)
    assert report.state == 43
    assert kinds(report.problems) == ["lost", "lost"]
    for missing in (41, 42):
        assert any(problem.endswith(f"must hold write {missing}") for problem in report.problems)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(40, 40, set()), (30, 50, set()), (30, 39, set()), (41, 50, {"lost"}), (30, 38, {"future"})],
)
def test_the_point_in_time_has_bounds(
    disk: Disk, before: int, after: int, expected: set[str]
) -> None:
    disk.write(range(1, 41))
    report = check_point_in_time(disk.path, WORK, before=before, after=after)
    assert set(kinds(report.problems)) == expected


def test_with_rare_acknowledgements_more_writes_are_unknown(disk: Disk) -> None:
    disk.work = attrs.evolve(WORK, ack_every=5)
    disk.write(range(1, 46))
    assert check_image(disk.path, disk.work, acknowledged=40).problems == ()
    disk.write([46])
    assert kinds(check_image(disk.path, disk.work, acknowledged=40).problems) == ["future"]


def test_a_block_in_the_wrong_place(disk: Disk) -> None:
    disk.write(range(1, 17))
    slot, other = WORK.slot(1), WORK.slot(2)
    disk.put(slot, WORK.block(2))
    (problem,) = check_image(disk.path, WORK, acknowledged=16).problems
    assert problem.startswith(f"foreign: slot {slot} at {WORK.offset(slot):#x} holds write 2 for")
    assert f"offset {WORK.offset(other):#x}" in problem


@pytest.mark.parametrize(("disk_index", "run"), [(0, 1), (1, 2)])
def test_blocks_of_another_disk_or_run(disk: Disk, disk_index: int, run: int) -> None:
    disk.disk = 1
    disk.write(range(1, 17))
    Disk(disk.path, attrs.evolve(WORK, run=run), disk_index).write([3])
    (problem,) = check_image(disk.path, WORK, acknowledged=16, disk=1).problems
    assert problem.startswith("foreign:")
    assert f"in run {run} on disk {disk_index}" in problem


@pytest.mark.parametrize(
    ("at", "forged", "kind"),
    [(0, b"qmpmblk0", "torn"), (8, (2).to_bytes(8, "little"), "foreign")],
    ids=["magic", "number"],
)
def test_a_good_checksum_is_not_enough(disk: Disk, at: int, forged: bytes, kind: str) -> None:
    disk.write([1, 2])
    block = WORK.block(1)
    body = block[:at] + forged + block[at + 8 : -8]
    disk.put(WORK.slot(1), body + zlib.crc32(body).to_bytes(8, "little"))
    assert kinds(check_image(disk.path, WORK, acknowledged=2).problems) == [kind]


def test_what_is_never_written_must_be_as_in_the_base(disk: Disk, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"\x5a" * SIZE)
    disk.path.write_bytes(base.read_bytes())
    disk.write(range(1, 9))
    assert check_image(disk.path, WORK, acknowledged=8, base=base).problems == ()
    assert kinds(check_image(disk.path, WORK, acknowledged=8).problems) == ["torn"] * 8

    untouched = WORK.newest(8).index(0)
    disk.put(untouched, bytes(512), within=1024)
    (problem,) = check_image(disk.path, WORK, acknowledged=8, base=base).problems
    assert problem.startswith("torn:")
    assert problem.endswith(
        "sectors 0-1 what was there before, sectors 2-2 zeros, sectors 3-7 what was there before"
    )


@pytest.mark.parametrize("at", [0, WORK.offset(0) - 1, WORK.offset(WORK.blocks), SIZE - 1, SIZE])
def test_a_change_outside_of_the_region(disk: Disk, tmp_path: Path, at: int) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(disk.path.read_bytes())
    disk.put(0, b"\1", within=at - WORK.offset(0))
    (problem,) = check_image(disk.path, WORK, acknowledged=0, base=base).problems
    assert problem.startswith("foreign:")
    assert problem.endswith("differs from the base")


def test_a_short_image_has_lost_what_it_lacks(disk: Disk) -> None:
    disk.write(range(1, 17))
    disk.path.write_bytes(disk.path.read_bytes()[: WORK.offset(15)])
    assert kinds(check_image(disk.path, WORK, acknowledged=16).problems) == ["lost"]


def test_the_log(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"start vda\nack 1 500\r\nerror 2 5 vda\nack 2 900\nack 3 900\nack 4000 90")
    assert acknowledged(log) == 3
    assert longest_write(log) == 900
    assert errors(log) == ["error 2 5 vda"]
    log.write_bytes(log.read_bytes() + b"0\n")
    assert acknowledged(log) == 4000


def test_a_last_ack_far_from_the_logs_end(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"ack 7 1\n" + b"error 8 28 vda\n" * 10000)
    assert acknowledged(log) == 7
    assert len(errors(log)) == 10000


def test_before_the_first_ack(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"")
    assert (acknowledged(log), longest_write(log), errors(log)) == (0, 0, [])


async def test_waiting_ends_with_the_ack(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"ack 9 1\nerror 10 5 vda\n")
    assert await until_acknowledged(log, 8) == 9


@pytest.mark.parametrize("last_words", ["fatal open /dev/vda", "[ 1.0] Kernel panic - not syncing"])
async def test_waiting_ends_with_the_guest(tmp_path: Path, last_words: str) -> None:
    log = tmp_path / "serial.log"
    log.write_text(f"ack 9 1\n{last_words}\n")
    with pytest.raises(TimeoutError, match=f"only 9.*{last_words[-20:]}"):
        await until_acknowledged(log, 10, timeout=3600)


async def test_waiting_ends_with_the_time(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_text("ack 9 1\n")
    with pytest.raises(TimeoutError, match="write 10 is not acknowledged, only 9"):
        await until_acknowledged(log, 10, timeout=0)


def test_the_options_for_qemu(tmp_path: Path) -> None:
    for name in ("vmlinuz", "initrd.cpio.gz"):
        (tmp_path / name).touch()
    workload = Workload(block_size=512, count=9, power_off=True)
    arguments = Guest.find(tmp_path).arguments(
        serial=tmp_path / "log", workload=workload, disks=("vda", "vdb")
    )
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["-kernel"] == str(tmp_path / "vmlinuz")
    assert options["-initrd"] == str(tmp_path / "initrd.cpio.gz")
    assert options["-serial"] == f"file:{tmp_path / 'log'}"
    words = options["-append"].split()
    assert {"qmpm.disks=vda,vdb", "qmpm.bs=512", "qmpm.count=9", "qmpm.end=poweroff"} <= {*words}


def test_without_a_guest_the_way_to_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPMIRROR_GUEST_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run scripts/guest"):
        Guest.find()


def test_what_cannot_be_flattened(tmp_path: Path) -> None:
    tool = tmp_path / "qemu-img"
    tool.write_text("#!/bin/sh\necho \"qemu-img: Could not open '$5'\" >&2\nexit 1\n")
    tool.chmod(0o755)
    with pytest.raises(ImageError, match=r"cannot flatten nowhere: .*Could not open 'nowhere'"):
        flatten("nowhere", tmp_path / "raw", qemu_img=tool)
