# SPDX-License-Identifier: MIT
"""What the fake mirror adds to the real one: the test decides when. Its likeness to the real one
is proven in tests/qemu/test_fake_likeness.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from qmpmirror.testing.fake_mirror import FakeMirror

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from qmpmirror.testing.fake import FakeMonitor


class Client:
    """A client of the library, with all of its events."""

    def __init__(self, fake: FakeMonitor) -> None:
        self.fake = fake
        self.qmp = QMPClient()
        self.events = EventListener()
        self.qmp.register_listener(self.events)

    async def execute(self, command: str, **arguments: Any) -> Any:
        return await self.qmp.execute(
            command, {name.replace("_", "-"): value for name, value in arguments.items()}
        )

    async def start(self, **arguments: Any) -> None:
        mirror = {"job_id": "j", "device": "src", "target": "tgt", "auto_dismiss": False}
        await self.execute("blockdev-mirror", sync="full", **{**mirror, **arguments})

    async def statuses(self, until: str) -> list[str]:
        seen: list[str] = []
        while not seen or seen[-1] != until:
            message: Any = await asyncio.wait_for(self.events.get(), 10)
            seen.append(message["data"].get("status", message["event"]))
        return seen

    async def info(self) -> Any:
        (info,) = await self.execute("query-block-jobs")
        return info


@pytest.fixture
async def client(fake_monitor: Callable[..., FakeMonitor]) -> AsyncIterator[Client]:
    async with fake_monitor(version=(8, 2, 0)) as fake:
        client = Client(fake)
        await client.qmp.connect(str(fake.path))
        yield client
        if fake.connected:
            await client.qmp.disconnect()


async def test_job_goes_on_only_as_the_test_says(client: Client) -> None:
    mirror = FakeMirror(client.fake, length=100, auto_ready=False, auto_end=False)
    await client.start()
    mirror.progress("j", 40, 120)
    info = await client.info()
    assert (info["offset"], info["len"], info["status"]) == (40, 120, "running")
    mirror.ready("j")
    mirror.blip("j")
    await client.execute("block-job-cancel", device="j")
    assert (await client.info())["status"] == "ready"
    mirror.end("j")
    assert await client.statuses("concluded") == [
        *("created", "running", "ready", "BLOCK_JOB_READY", "standby", "ready"),
        *("waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded"),
    ]
    assert mirror.pivoted == {}


async def test_pivot_is_recorded(client: Client) -> None:
    mirror = FakeMirror(client.fake)
    await client.start()
    await client.start(job_id="k", device="root", target="other", replaces="below")
    for job in ("j", "k"):
        await client.execute("job-complete", id=job)
        await client.execute("job-dismiss", id=job)
    assert mirror.pivoted == {"src": "tgt", "below": "other"}
    assert await client.execute("query-jobs") == []


async def test_failure_in_mid_copy(client: Client) -> None:
    mirror = FakeMirror(client.fake, auto_ready=False)
    await client.start()
    mirror.io_error("j", action="report")
    mirror.fail("j", "No space left on device")
    assert "BLOCK_JOB_ERROR" in await client.statuses("concluded")
    assert (await client.info())["error"] == "No space left on device"


async def test_error_that_stops_the_job_holds_its_ending_until_it_is_resumed(
    client: Client,
) -> None:
    mirror = FakeMirror(client.fake)
    await client.start()
    mirror.io_error("j", action="stop")
    info = await client.info()
    assert (info["io-status"], info["paused"], info["status"]) == ("failed", True, "standby")
    with pytest.raises(ExecuteError, match="currently paused"):
        await client.execute("block-job-cancel", device="j")
    await client.execute("block-job-complete", device="j")
    assert (await client.info())["status"] == "standby"
    await client.execute("job-resume", id="j")
    assert (await client.statuses("concluded"))[-4:] == [
        *("waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded")
    ]


async def test_second_complete_kills_an_old_qemu_if_it_was_to_replace(client: Client) -> None:
    FakeMirror(client.fake, auto_end=False, crash_on_second_complete=True)
    await client.start(replaces="below")
    await client.execute("job-complete", id="j")
    with pytest.raises(QMPError):
        await client.execute("job-complete", id="j")
    assert client.fake.connected == 0
    with pytest.raises(EOFError):
        await client.qmp.disconnect()


async def test_before_6_1_a_job_in_standby_cannot_complete(client: Client) -> None:
    client.fake.version = (5, 2, 0)
    mirror = FakeMirror(client.fake)
    await client.start()
    mirror.io_error("j", action="stop")
    with pytest.raises(ExecuteError, match="in state 'standby' cannot accept"):
        await client.execute("job-complete", id="j")
    assert "actively-synced" not in await client.info()


async def test_synced_actively_once_changed_to_write_blocking(client: Client) -> None:
    FakeMirror(client.fake)
    await client.start()
    assert (await client.info())["actively-synced"] is False
    await client.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    assert [(await client.info())["actively-synced"] for _ in range(2)] == [False, True]
    with pytest.raises(ExecuteError, match="not implemented"):
        await client.execute("block-job-change", id="j", type="mirror", copy_mode="background")
