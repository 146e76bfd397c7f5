# SPDX-License-Identifier: MIT
"""A fake monitor in front of a real QEMU changes what it is told to change, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from qmpmirror.testing.fake import FakeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.testing import Qemu
    from qmpmirror.testing.fake import FakeMonitor
    from qmpmirror.testing.plugin import CleanGraph, QemuFactory

    Factory = Callable[..., FakeMonitor]

NULL = {"driver": "null-co", "size": 1 << 20}


@pytest.fixture
def vm(qemu: QemuFactory) -> Qemu:
    return qemu().start()


def nodes(vm: Qemu) -> set[str]:
    return {node["node-name"] for node in vm.execute("query-named-block-nodes")}


async def connected(fake: FakeMonitor) -> QMPClient:
    client = QMPClient()
    await client.connect(str(fake.path))
    return client


async def test_only_the_version_is_another_one(vm: Qemu, fake_monitor: Factory) -> None:
    async with fake_monitor(upstream=vm.qmp, version=(8, 2, 0)) as fake:
        client = await connected(fake)
        version: Any = await client.execute("query-version")
        assert version["qemu"] == {"major": 8, "minor": 2, "micro": 0}
        # QEMU numbers the types anew at each start, so it is the same QEMU that is asked.
        assert await client.execute("query-qmp-schema") == vm.execute("query-qmp-schema")
        await client.disconnect()
    assert fake.commands == ["qmp_capabilities", "query-version", "query-qmp-schema"]


async def test_without_a_version_it_is_the_real_one(vm: Qemu, fake_monitor: Factory) -> None:
    async with fake_monitor(upstream=vm.qmp) as fake:
        client = await connected(fake)
        assert await client.execute("query-version") == vm.execute("query-version")
        await client.disconnect()


async def test_mirror_runs_in_the_real_qemu(
    vm: Qemu, fake_monitor: Factory, clean_graph: CleanGraph
) -> None:
    async with fake_monitor(upstream=vm.qmp, lost_events={"BLOCK_JOB_READY"}) as fake:
        client, listener = await connected(fake), EventListener()
        await client.execute("blockdev-add", {**NULL, "node-name": "src"})
        await client.execute("blockdev-add", {**NULL, "node-name": "tgt"})
        clean_graph.expect(vm)
        with client.listen(listener):
            await client.execute(
                "blockdev-mirror",
                {"job-id": "j", "device": "src", "target": "tgt", "sync": "full"},
            )
            seen: list[str] = []
            while "null" not in seen:
                message: Any = await asyncio.wait_for(listener.get(), 20)
                seen.append(message["data"].get("status", message["event"]))
                if seen[-1] == "ready":
                    await client.execute("block-job-cancel", {"device": "j"})
        await client.disconnect()
    assert seen == [
        *("created", "running", "ready", "waiting", "pending"),
        *("BLOCK_JOB_COMPLETED", "concluded", "null"),
    ]


async def test_command_may_be_scripted_while_the_others_are_real(
    vm: Qemu, fake_monitor: Factory
) -> None:
    async with fake_monitor(upstream=vm.qmp) as fake:
        fake.on("query-status", {"status": "io-error", "running": False})
        fake.on("blockdev-del", FakeError("Node 'a' is in use"))
        client = await connected(fake)
        status, _, refusal = await asyncio.gather(
            client.execute("query-status"),
            client.execute("blockdev-add", {**NULL, "node-name": "a"}),
            client.execute("blockdev-del", {"node-name": "a"}),
            return_exceptions=True,
        )
        assert status == {"status": "io-error", "running": False}
        assert isinstance(refusal, ExecuteError)
        assert nodes(vm) == {"a"}
        await client.disconnect()


@pytest.mark.parametrize("fault", [{"drop": True, "close": True}, {"half": True}])
async def test_command_is_executed_but_its_reply_is_lost_with_the_connection(
    vm: Qemu, fake_monitor: Factory, fault: dict[str, bool]
) -> None:
    async with fake_monitor(upstream=vm.qmp) as fake:
        fake.fault("blockdev-add", **fault)
        client = await connected(fake)
        with pytest.raises(ExecInterruptedError):
            await client.execute("blockdev-add", {**NULL, "node-name": "a"})
        assert nodes(vm) == {"a"}
        with pytest.raises((EOFError, QMPError)):
            await client.disconnect()
        again = await connected(fake)
        await again.execute("blockdev-del", {"node-name": "a"})
        await again.disconnect()
    assert nodes(vm) == set()


async def test_qemu_that_dies_takes_the_connection_along(vm: Qemu, fake_monitor: Factory) -> None:
    async with fake_monitor(upstream=vm.qmp) as fake:
        client = await connected(fake)
        vm.kill()
        await client.runstate_changed()
        with pytest.raises(EOFError):
            await client.disconnect()
        assert fake.connected == 0


async def test_own_events_between_real_ones(vm: Qemu, fake_monitor: Factory) -> None:
    async with fake_monitor(upstream=vm.qmp, duplicate_event=True) as fake:
        client, listener = await connected(fake), EventListener()
        with client.listen(listener):
            fake.send_event("BLOCK_IO_ERROR", device="vd0")
            vm.execute("quit")
            names = [(await asyncio.wait_for(listener.get(), 20))["event"] for _ in range(4)]
        with contextlib.suppress(EOFError):  # it may or may not have come to the end already
            await client.disconnect()
    assert names == ["BLOCK_IO_ERROR"] * 2 + ["SHUTDOWN"] * 2
