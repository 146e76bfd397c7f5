# SPDX-License-Identifier: MIT
"""Hazards of QEMUs that are not to be had here, and of monitors that lose or repeat messages.

A fake monitor stands in front of a real QEMU: the copy is real, and only what the test says is not.
The numbers are those of docs/hazards.md.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, names
from qmpmirror.testing.fake import FakeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing.fake import FakeMonitor
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

    Factory = Callable[..., FakeMonitor]

AFFECTED = [(8, 2, 0), (9, 0, 3), (10, 0, 9), (10, 1, 2), (10, 2, 1)]
SOUND = [(5, 2, 0), (7, 2, 22), (8, 1, 5), (10, 0, 10), (10, 2, 2), (11, 0, 0)]


def dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


@pytest.fixture
def vm(qemu: QemuFactory, qemu_chain: list[Path]) -> Qemu:
    storage = {"driver": "file", "node-name": "prot0", "filename": str(qemu_chain[-1])}
    disk = {"driver": "qcow2", "node-name": "fmt0", "file": storage}
    made = qemu(
        *("-blockdev", json.dumps(disk), "-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
        machine="pc",
        name=None,
    )
    return made.start()


def order(fake: FakeMonitor, *wanted: str) -> list[str]:
    return [command for command in fake.commands if command in wanted]


@pytest.mark.parametrize("version", AFFECTED, ids=dotted)
async def test_7_vcpus_are_stopped_while_a_mirror_starts_that_would_miss_writes(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path, version: tuple[int, int, int]
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, version=version) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        assert order(fake, "stop", "blockdev-mirror", "cont") == ["stop", "blockdev-mirror", "cont"]
        (mark,) = fake.arguments_of("block-dirty-bitmap-add")
        assert names.parse_bitmap(mark["name"]) == (copy.name.run, names.Mark.STOPPED)
        status = await machine.monitor.execute("query-status")
        assert status["running"]
        graph = await machine.graph()
        assert not [b for b in graph.nodes[copy.target_node].bitmaps if b.name]
        assert (await copy.pivot()).outcome is Phase.PIVOTED


@pytest.mark.parametrize("version", SOUND, ids=dotted)
async def test_7_vcpus_run_on_where_no_write_is_missed(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path, version: tuple[int, int, int]
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, version=version) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        await (await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)).abort()
        assert order(fake, "stop", "cont") == []


async def test_7_the_safe_start_can_be_declined(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, version=(8, 2, 0)) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True, safe_start=False)
        await copy.abort()
        assert order(fake, "stop", "cont") == []


async def test_7_a_paused_guest_stays_paused(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    vm.execute("stop")
    async with (
        fake_monitor(upstream=vm.qmp, version=(8, 2, 0)) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        assert not (await machine.monitor.execute("query-status"))["running"]
        await copy.abort()


@pytest.mark.parametrize("via", ["blockdev-mirror", "drive-mirror"])
async def test_7_a_start_that_fails_lets_the_guest_go_on(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path, via: str
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, version=(9, 1, 0)) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        before = set((await machine.graph()).nodes)
        fake.on(via, FakeError("no way"))
        with pytest.raises(qmpmirror.CommandFailed, match="no way"):
            await machine.blockcopy("vd0", tmp_path / "copy", shallow=True, via=via)
        assert (await machine.monitor.execute("query-status"))["running"]
        assert set((await machine.graph()).nodes) == before
        assert await machine.monitor.execute("query-jobs") == []
    assert not (tmp_path / "copy").exists()


async def test_6_repeated_events_cause_one_job_complete(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, duplicate_event=True) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        for status in ("standby", "ready", "ready"):
            fake.send_event("JOB_STATUS_CHANGE", id=copy.id, status=status)
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        assert len(fake.arguments_of("job-complete")) == 1


async def test_6_another_process_does_not_repeat_job_complete(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        fake.on("job-complete", {})  # as if the guest wrote too fast for it to end
        await copy.request(qmpmirror.Ending.PIVOT)
        other = await machine.blockjob("vd0")
        assert isinstance(other, qmpmirror.Copy)
        with pytest.raises(qmpmirror.EndingAlreadyAsked):
            await other.pivot()
        with pytest.raises(qmpmirror.EndingAlreadyAsked):
            await other.finish()
        assert len(fake.arguments_of("job-complete")) == 1
        assert (await other.abort(force=True)).outcome is Phase.ABORTED
        other.job.close()


async def test_events_that_are_lost_only_cost_time(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    lost = {"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"}
    async with (
        fake_monitor(upstream=vm.qmp, lost_events=lost) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        assert await copy.ready()
        assert (await copy.pivot()).outcome is Phase.PIVOTED


async def test_12_writes_are_made_to_wait_when_a_pivot_does_not_converge(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        fake.on("job-complete", {})
        with pytest.raises(qmpmirror.DeadlineExceeded, match="faster than the destination"):
            await copy.pivot(seconds=2.5)
        can_change = (await machine.schema()).has_command("block-job-change")
        changes = fake.arguments_of("block-job-change")
        assert [change["copy-mode"] for change in changes] == ["write-blocking"] * can_change
        assert (await copy.abort(force=True)).outcome is Phase.ABORTED


async def test_12_never_where_it_would_corrupt_the_copy(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True, via="drive-mirror")
        await copy.ready()
        fake.on("job-complete", {})
        with pytest.raises(qmpmirror.DeadlineExceeded):
            await copy.pivot(seconds=2.5)
        assert fake.arguments_of("block-job-change") == []
        await copy.abort(force=True)


@pytest.mark.parametrize("command", ["blockdev-add", "blockdev-create", "blockdev-mirror"])
async def test_a_lost_connection_says_what_was_under_way(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path, command: str
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        fake.close_after(command, reply=False)
        with pytest.raises(qmpmirror.ConnectionLost) as loss:
            await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        assert loss.value.command == command
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        await machine.recover(qmpmirror.Way.UNDO)
        assert await machine.jobs() == []
        assert not [n for n in (await machine.graph()).nodes if names.parse_node(n)]


async def test_a_silent_qemu_is_no_endless_wait(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        fake.drop_reply("query-status")
        with pytest.raises(qmpmirror.CommandTimeout, match=r"query-status within 0\.2 s"):
            await machine.monitor.execute("query-status", seconds=0.2)
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.abort()


async def test_a_job_without_progress_is_a_stall(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp, lost_events={"JOB_STATUS_CHANGE"}) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy(
            "vd0", tmp_path / "copy", shallow=True, bandwidth=1, buf_size=65536
        )
        job = {"id": copy.id, "type": "mirror", "status": "running"}
        fake.on("query-jobs", [job | {"current-progress": 5, "total-progress": 9}])
        with pytest.raises(qmpmirror.Stalled, match=r"no progress for 0\.2 s"):
            await asyncio.wait_for(copy.ready(stall_seconds=0.2), 30)
        fake.on("query-jobs", lambda _: vm.execute("query-jobs"))
        await copy.abort(force=True)


async def test_a_client_of_somebody_elses_is_left_as_it_was(vm: Qemu, tmp_path: Path) -> None:
    from qemu.qmp import QMPClient, Runstate  # noqa: PLC0415 - this test's subject

    client = QMPClient()
    await client.connect(str(vm.qmp))
    seen: Any = client.events
    async with qmpmirror.Machine(client) as machine:
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        assert (await copy.finish()).outcome is Phase.FINISHED
    assert client.runstate is Runstate.RUNNING
    assert await client.execute("query-name") == {}
    assert any(message["event"] == "BLOCK_JOB_READY" for message in seen.history)
    await client.disconnect()


async def test_a_pivot_that_qemu_refuses_can_be_asked_for_again(
    vm: Qemu, fake_monitor: Factory, tmp_path: Path
) -> None:
    async with (
        fake_monitor(upstream=vm.qmp) as fake,
        qmpmirror.connect(str(fake.path)) as machine,
    ):
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        for command in ("job-complete", "transaction", "query-block-jobs"):
            fake.on(command, FakeError("not now"))
        vm.execute("block-dirty-bitmap-add", node="fmt0", name="somebodys")
        for command in ("transaction", "query-block-jobs", "job-complete"):
            with pytest.raises(qmpmirror.CommandFailed, match=f"QEMU refused {command}: not now"):
                await copy.pivot()
            assert copy.phase is Phase.MIRRORING
            fake.forget(command)
        assert (await copy.pivot()).outcome is Phase.PIVOTED


async def test_a_paused_copy_is_not_ended_but_can_be_aborted(vm: Qemu, tmp_path: Path) -> None:
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        await copy.pause()
        await copy.job.wait(lambda life: life.status == "standby")
        for ending in (copy.pivot, copy.finish, copy.abort):
            with pytest.raises(qmpmirror.JobError, match="is paused"):
                await ending()
        await copy.resume()
        await copy.ready()
        await copy.pause()
        assert (await copy.abort(force=True)).outcome is Phase.ABORTED
