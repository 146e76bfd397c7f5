# SPDX-License-Identifier: MIT
"""The client of a group dies in the middle of the cut: no disk stands still for long."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, Way, errors, names
from qmpmirror.monitor import Monitor
from qmpmirror.watchdog import Watchdog
from tests.qemu.disks import Disks, make_disks
from tests.qemu.program import until

if TYPE_CHECKING:
    from qmpmirror.testing import ImageTools
    from tests.qemu.conftest import Boot, Cli

CLIENT = Path(__file__).with_name("group_client.py")


@pytest.fixture
def disks(boot: Boot, images: ImageTools, tmp_path: Path) -> Disks:
    return make_disks(boot, images, tmp_path, 2)


def kill_client(disks: Disks, moment: str, company: str, ending: str) -> None:
    specs = [f"--diskspec=vd{n},dest={disks.copy(n)}" for n in disks]
    words = ["blockcopy", str(disks.vm.qmp), *specs, f"--{ending}", "--max-freeze", "60000"]
    run = subprocess.run(
        [sys.executable, str(CLIENT), moment, company, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == -9, run.stderr


def check_nothing_is_left(disks: Disks, *, made: bool, pivoted: bool) -> None:
    vm = disks.vm
    assert vm.execute("query-jobs") == []
    switched = made and pivoted
    assert disks.active == [disks.copy(n) if switched else disks.top(n) for n in disks]
    nodes = vm.execute("query-named-block-nodes")
    ours = [node for node in nodes if names.parse_node(node["node-name"])]
    assert bool(ours) is switched
    assert not [b for node in nodes for b in node.get("dirty-bitmaps", ()) if b.get("name")]
    assert [disks.copy(n).exists() for n in disks] == [made, made]


@pytest.mark.parametrize("ending", ["pivot", "finish"])
@pytest.mark.parametrize("moment", ["first", "pending", "between"])
async def test_the_watchdog_lets_the_disks_go_on(disks: Disks, moment: str, ending: str) -> None:
    await asyncio.to_thread(kill_client, disks, moment, "watched", ending)
    until(lambda: set(disks.statuses()) == {"concluded"})
    disks.write(0x51)
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        findings = await machine.recover()
        assert len(findings) == 2
        assert await machine.recover() == []
    check_nothing_is_left(disks, made=moment == "between", pivoted=ending == "pivot")
    disks.write(0x52)


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
@pytest.mark.parametrize("ending", ["pivot", "finish"])
@pytest.mark.parametrize("moment", ["first", "pending", "between"])
async def test_recover_alone_does_it_too(disks: Disks, moment: str, ending: str, way: Way) -> None:
    await asyncio.to_thread(kill_client, disks, moment, "alone", ending)
    assert "pending" in disks.statuses()
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        (first, _) = await machine.recover(way, dry_run=True)
        assert first.action.startswith("would be ")
        assert "pending" in disks.statuses()
        await machine.recover(way)
        assert await machine.recover() == []
    disks.write(0x53)
    check_nothing_is_left(disks, made=moment == "between", pivoted=ending == "pivot")


async def test_a_lost_connection_wakes_the_watchdog(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Monitor.execute
    completed: list[str] = []

    async def execute_until_cut_off(self: Monitor, command: str, *rest: Any, **options: Any) -> Any:
        if command == "job-complete":
            completed.append(command)
            if len(completed) == 2:
                await asyncio.to_thread(disks.until_pending, 1)
                writer = self.client._writer
                assert writer is not None
                writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        return await execute(self, command, *rest, **options)

    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        group = await machine.blockcopy_group(disks.members(), max_freeze=60)
        await group.ready()
        monkeypatch.setattr(Monitor, "execute", execute_until_cut_off)
        with pytest.raises(errors.ConnectionLost):
            await group.pivot()
    assert set(disks.statuses()) == {"concluded"}
    disks.write(0x54)
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        await machine.recover()
    check_nothing_is_left(disks, made=False, pivoted=True)


@pytest.mark.parametrize("ending", ["pivot", "finish", "abort"])
async def test_one_of_a_group_can_be_ended_alone(disks: Disks, cli: Cli, ending: str) -> None:
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        group = await machine.blockcopy_group(disks.members())
        await group.ready()
    flag = {"pivot": "--pivot", "finish": "--abort", "abort": "--abort"}[ending]
    words = ["--async"] if ending == "finish" else []
    run = await asyncio.to_thread(cli, "blockjob", disks.vm.qmp, "vd0", flag, *words)
    assert run.returncode == 0, run.stderr
    if ending == "finish":
        await asyncio.to_thread(cli, "recover", disks.vm.qmp)
    disks.write(0x55)
    assert disks.active[0] == (disks.copy(0) if ending == "pivot" else disks.top(0))
    assert "pending" not in disks.statuses()
    await asyncio.to_thread(cli, "recover", disks.vm.qmp, "--undo")
    assert disks.statuses() == []
    assert disks.active[1] == disks.top(1)
    disks.write(0x56)


async def test_recover_ends_a_group_together(disks: Disks) -> None:
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        await machine.blockcopy_group(disks.members(then="pivot"))
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        left = await machine.recover()
        assert [finding.action for finding in left] == ["left running"] * 2
        done = await machine.recover(Way.FINISH)
        assert [finding.action for finding in done] == ["pivoted"] * 2
        assert await machine.recover() == []
    check_nothing_is_left(disks, made=True, pivoted=True)
    disks.write(0x57)


@pytest.mark.parametrize("trouble", ["not all started", "one failed"])
async def test_recover_never_ends_a_part_of_a_group(
    disks: Disks, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        members = disks.members(then="finish", bandwidth=1, buf_size=65536)
        if trouble == "one failed":
            group = await machine.blockcopy_group(members)
            disks.vm.execute("job-cancel", id=group.copies[1].id)
        else:
            execute = Monitor.execute
            started: list[str] = []

            async def start_one(self: Monitor, command: str, *rest: Any, **options: Any) -> Any:
                reply = await execute(self, command, *rest, **options)
                if command == "blockdev-mirror":
                    started.append(command)
                    writer = self.client._writer
                    assert writer is not None
                    writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                return reply

            with monkeypatch.context() as patch:
                patch.setattr(Monitor, "execute", start_one)
                with pytest.raises(errors.ConnectionLost):
                    await machine.blockcopy_group(members)
            assert len(started) == 1
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        findings = await machine.recover(Way.FINISH)
        assert "aborted: the incomplete copy was removed" in {f.action for f in findings}
        assert await machine.recover() == []
    check_nothing_is_left(disks, made=False, pivoted=False)


async def test_a_watchdog_that_was_killed_keeps_nobody_from_the_cut(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = Watchdog.__aenter__

    async def enter_and_kill(self: Watchdog) -> None:
        await enter(self)
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    monkeypatch.setattr(Watchdog, "__aenter__", enter_and_kill)
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        group = await machine.blockcopy_group(disks.members())
        await group.ready()
        assert (await group.pivot()).outcome is Phase.PIVOTED
