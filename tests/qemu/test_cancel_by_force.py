# SPDX-License-Identifier: MIT
"""Hazard 14: a mirror is cancelled by force while guest writes wait for its target.

QEMU frees its bitmap of what is in flight before such a write has let go of it. Here that bitmap is
so large that the C library gives it back to the kernel at once: QEMU would end in the same instant.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

import qmpmirror
from qmpmirror import Ending, Member, Options, Phase, Way

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from typing_extensions import Unpack

    from qmpmirror import Copy, Machine
    from qmpmirror.operations.options import Keywords
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

SIZE = 1024 * 1024 * 1024
GRANULARITY = 512
WRITES = 8
SLOW = 4  # requests/s


@pytest.fixture
def vm(
    qemu: QemuFactory, images: ImageTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Qemu:
    """Two disks, and a limit for the destinations that can be drawn tight."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")
    words = ["-object", "throttle-group,id=limit"]
    for number in (0, 1):
        top = images.create(tmp_path / f"top{number}", SIZE)
        words += ["-drive", f"if=none,id=d{number},format=qcow2,file={top}"]
        words += ["-device", f"virtio-blk-pci,drive=d{number},id=vd{number}"]
        images.create(tmp_path / f"copy{number}", SIZE, "raw")
    made = qemu(*words, machine="pc", name=None)
    made.start()
    return made


@pytest.fixture
async def machine(vm: Qemu) -> AsyncIterator[Machine]:
    async with qmpmirror.connect(str(vm.qmp)) as connected:
        yield connected


def destination(folder: Path, number: int) -> str:
    storage = {"driver": "file", "filename": str(folder / f"copy{number}")}
    throttled = {"driver": "throttle", "throttle-group": "limit", "file": storage}
    return "json:" + json.dumps({"driver": "raw", "file": throttled})


async def write_into_slowness(vm: Qemu, *devices: str) -> None:
    """Leave guest writes on their way to a target that takes its time."""
    arguments = {"path": "/objects/limit", "property": "limits", "value": {"iops-total": SLOW}}
    await asyncio.to_thread(vm.execute, "qom-set", arguments)
    for device in devices:
        for number in range(WRITES):
            command = f"aio_write -P {number + 1} {number * 64}k 64k"
            await asyncio.to_thread(vm.io, device, command)


async def check_lives_on(vm: Qemu, *devices: str) -> None:
    """All the writes come to their end, and are there."""
    await asyncio.sleep((WRITES + 1) * len(devices) / SLOW)
    for device in devices:
        for number in range(WRITES):
            await asyncio.to_thread(vm.io, device, f"read -P {number + 1} {number * 64}k 64k")


async def start(machine: Machine, folder: Path, **others: Unpack[Keywords]) -> Copy:
    options: Keywords = {"granularity": GRANULARITY, "reuse_external": True, **others}
    return await machine.blockcopy("vd0", destination(folder, 0), **options)


@pytest.mark.parametrize(
    "switched", [False, pytest.param(True, marks=pytest.mark.qemu(">= 8.2"))], ids=str
)
async def test_14_in_the_mirroring_phase(
    vm: Qemu, machine: Machine, tmp_path: Path, *, switched: bool
) -> None:
    copy = await start(machine, tmp_path, synchronous_writes=not switched)
    await copy.ready()
    if switched:
        await copy.make_synchronous()
    await write_into_slowness(vm, "vd0")
    result = await copy.abort(force=True)
    assert (result.outcome, result.consistent) == (Phase.ABORTED, False)
    await check_lives_on(vm, "vd0")


@pytest.mark.parametrize("synchronous", [True, False])
async def test_14_before_the_mirroring_phase(
    vm: Qemu, machine: Machine, tmp_path: Path, *, synchronous: bool
) -> None:
    await asyncio.to_thread(vm.io, "vd0", "write -P 9 64M 32M")
    copy = await start(machine, tmp_path, synchronous_writes=synchronous, bandwidth=65536)
    assert copy.phase is Phase.COPYING
    await write_into_slowness(vm, "vd0")
    assert (await copy.abort()).outcome is Phase.ABORTED
    assert vm.execute("query-status")["running"]
    await check_lives_on(vm, "vd0")


@pytest.mark.parametrize("by", ["its client", "recover"])
async def test_14_of_a_group(vm: Qemu, machine: Machine, tmp_path: Path, by: str) -> None:
    options = Options(granularity=GRANULARITY, reuse_external=True, synchronous_writes=True)
    group = await machine.blockcopy_group(
        [Member(f"vd{number}", destination(tmp_path, number), options) for number in (0, 1)]
    )
    await group.ready()
    if by == "recover":
        for copy in group.copies:
            await copy.prepare(Ending.PIVOT)
    await write_into_slowness(vm, "vd0", "vd1")
    if by == "recover":
        findings = await machine.recover(Way.UNDO)
        assert {finding.action for finding in findings} == {"aborted: the copy is not usable"}
    else:
        result = await group.abort()
        assert {each.outcome for each in result.results} == {Phase.ABORTED}
    await check_lives_on(vm, "vd0", "vd1")


@pytest.mark.parametrize("asked", [False, True])
async def test_14_by_recover(vm: Qemu, machine: Machine, tmp_path: Path, *, asked: bool) -> None:
    """By another process, which knows of the copy what QEMU and the job's name say."""
    copy = await start(machine, tmp_path, synchronous_writes=True)
    await copy.ready()
    if asked:
        await copy.prepare(Ending.PIVOT)
    copy.job.close()
    await write_into_slowness(vm, "vd0")
    (finding,) = await machine.recover(Way.UNDO)
    assert finding.action.startswith("aborted")
    assert vm.execute("query-status")["running"]
    await check_lives_on(vm, "vd0")
