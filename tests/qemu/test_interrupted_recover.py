# SPDX-License-Identifier: MIT
"""``recover --undo`` dies before each of its QMP commands; the next puts all away, files too."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qmpmirror
from qmpmirror import Way
from qmpmirror.testing.graph import GraphSnapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qmpmirror import Machine
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

CLIENT = Path(__file__).parents[1] / "guest" / "interrupted_client.py"
KILLED = -9
MIB = 1024 * 1024


@pytest.fixture
def vm(qemu: QemuFactory, qemu_chain: list[Path]) -> Qemu:
    drive = f"if=none,id=d,format=qcow2,file={qemu_chain[-1]}"
    made = qemu("-drive", drive, "-device", "virtio-blk-pci,drive=d,id=vd0", machine="pc")
    made.start()
    return made


async def copied(machine: Machine, folder: Path) -> None:
    await (await machine.blockcopy("vd0", folder / "copy", shallow=True)).ready()


async def begun(machine: Machine, folder: Path) -> None:
    await machine.blockcopy("vd0", folder / "copy", bandwidth=65536)


async def with_data_file(machine: Machine, folder: Path) -> None:
    creation = {"data_file": str(folder / "data")}
    await machine.blockcopy("vd0", folder / "copy", bandwidth=65536, creation=creation)


async def moved(machine: Machine, folder: Path) -> None:
    await (await machine.move_storage("vd0", folder)).ready()


async def about_to_pivot(machine: Machine, folder: Path) -> None:
    move = await machine.move_storage("vd0", folder)
    await move.ready()
    await move.prepare(qmpmirror.Ending.PIVOT)


@pytest.mark.parametrize("begin", [copied, begun, with_data_file, moved, about_to_pivot])
async def test_the_next_one_puts_all_away(
    vm: Qemu, tmp_path: Path, begin: Callable[[Machine, Path], Awaitable[None]]
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    before, number, killed = GraphSnapshot.take(vm.execute), 0, True
    while killed:
        async with qmpmirror.connect(str(vm.qmp)) as machine:
            await begin(machine, folder)
        log = tmp_path / f"log{number}"
        words = [str(number), "kill", "before", str(log), "recover", str(vm.qmp), "--undo"]
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, str(CLIENT), *words], check=False, capture_output=True
        )
        killed = ran.returncode == KILLED
        async with qmpmirror.connect(str(vm.qmp)) as machine:
            findings = await machine.recover(Way.UNDO)
            assert await machine.recover() == []
        where = f"killed before command {number}, {log.read_text().splitlines()[-1]}: {findings}"
        assert [path.name for path in folder.iterdir()] == [], where
        assert before.differences(GraphSnapshot.take(vm.execute)) == [], where
        number += 1
