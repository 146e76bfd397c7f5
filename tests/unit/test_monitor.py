# SPDX-License-Identifier: MIT
"""Connecting and executing against a monitor that behaves badly on purpose."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import errors
from qmpmirror.monitor import MAX_REPLY
from qmpmirror.testing.fake import FakeError, event

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing.fake import FakeMonitor

    Factory = Callable[..., FakeMonitor]

SHUTDOWN = event("SHUTDOWN", guest=False)


@pytest.mark.parametrize("early", ["event_before_greeting", "event_before_capabilities_reply"])
async def test_an_event_before_the_session_is_survived(fake_monitor: Factory, early: str) -> None:
    async with fake_monitor(**{early: SHUTDOWN}) as fake:
        async with qmpmirror.connect(str(fake.path)) as machine:
            assert await machine.monitor.execute("query-name") == {}
        assert fake.commands == ["qmp_capabilities", "query-name"]


async def test_a_late_greeting_is_waited_for(fake_monitor: Factory) -> None:
    async with (
        fake_monitor(greeting_delay=0.3) as fake,
        qmpmirror.connect(str(fake.path), timeout=20) as machine,
    ):
        assert await machine.monitor.execute("query-name") == {}


async def test_a_connection_that_breaks_in_the_greeting_is_tried_again(
    fake_monitor: Factory,
) -> None:
    async with fake_monitor(half_line_then_close=True) as fake:

        async def mend() -> None:
            while not fake.accepted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            fake.half_line_then_close = False

        mending = asyncio.create_task(mend())
        async with qmpmirror.connect(str(fake.path), timeout=20) as machine:
            assert await machine.monitor.execute("query-name") == {}
        await mending


async def test_no_greeting_is_a_busy_monitor(fake_monitor: Factory) -> None:
    async with fake_monitor(no_greeting=True) as fake:
        with pytest.raises(qmpmirror.MonitorBusy, match="no QMP greeting") as busy:
            await qmpmirror.connect(str(fake.path), timeout=0.3)
    assert busy.value.address == str(fake.path)


async def test_a_second_client_hears_that_there_is_another(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)):
        with pytest.raises(qmpmirror.MonitorBusy, match="another client holds this monitor"):
            await qmpmirror.connect(str(fake.path), timeout=0.3)


@pytest.mark.parametrize(
    "garbage",
    [
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
        b'{"a": 1}\r\n',
        b"[]\n",
    ],
    ids=["hmp", "other-json", "no-object"],
)
async def test_something_else_than_qmp(fake_monitor: Factory, garbage: bytes) -> None:
    async with fake_monitor(garbage=garbage) as fake:
        with pytest.raises(qmpmirror.NotQMP, match="does not speak QMP"):
            await qmpmirror.connect(str(fake.path), timeout=5)


async def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(qmpmirror.NotListening, match=f"nobody listens on {path}"):
        await qmpmirror.connect(str(path))


async def test_a_full_backlog_is_no_connection(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        with pytest.raises(qmpmirror.MonitorBusy):
            await qmpmirror.connect(str(path), timeout=0.3)
        for client in waiting:
            client.close()


async def test_errors_carry_qemus_reason(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:
        fake.on("job-cancel", FakeError("Job not found"))
        with pytest.raises(qmpmirror.CommandFailed) as failure:
            await machine.monitor.execute("job-cancel", {"id": "j"})
    error = failure.value
    assert (error.command, error.arguments, error.reason) == (
        "job-cancel",
        {"id": "j"},
        "Job not found",
    )
    assert str(error) == "QEMU refused job-cancel: Job not found"


async def test_a_command_whose_reply_is_lost_with_the_connection(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:
        fake.on("job-complete", {})
        fake.close_after("job-complete", reply=False)
        with pytest.raises(qmpmirror.ConnectionLost) as loss:
            await machine.monitor.execute("job-complete", {"id": "j"})
        assert loss.value.command == "job-complete"
        with pytest.raises(qmpmirror.ConnectionLost):
            await machine.monitor.execute("query-jobs")


async def test_subscribers_hear_of_events_in_order_and_of_the_loss_once(
    fake_monitor: Factory,
) -> None:
    heard: list[Any] = []
    lost = asyncio.Event()
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:

        def hear(event: Any) -> None:
            heard.append(event.name if event else None)
            if event is None:
                lost.set()

        machine.monitor.subscribe(hear)
        silent = machine.monitor.subscribe(lambda _: heard.append("unsubscribed"))
        silent()
        for name in ("STOP", "RESUME", "SHUTDOWN"):
            fake.send_event(name)
        await machine.monitor.execute("query-name")
        fake.disconnect()
        await asyncio.wait_for(lost.wait(), 10)
    assert heard == ["STOP", "RESUME", "SHUTDOWN", None]


async def test_no_event_is_kept(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:
        for _ in range(100):
            fake.send_event("STOP")
        await machine.monitor.execute("query-name")
        client = machine.monitor.client
        assert client.events.history == ()
        assert client.events.empty()
        assert machine.monitor._listener.history == ()


async def test_a_long_reply_is_no_end(fake_monitor: Factory) -> None:
    text = "x" * (12 * 1024 * 1024)
    assert len(text) < MAX_REPLY
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:
        fake.on("query-name", {"name": text})
        assert await machine.monitor.execute("query-name") == {"name": text}


async def test_late_reply_of_a_timed_out_command_disturbs_nobody(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, qmpmirror.connect(str(fake.path)) as machine:
        fake.delay_reply("query-name", 0.3)
        with pytest.raises(errors.CommandTimeout, match=r"query-name within 0\.1 s"):
            await machine.monitor.execute("query-name", seconds=0.1)
        assert await machine.monitor.execute("query-jobs") == []


async def test_the_transcript_pairs_commands_and_replies(
    fake_monitor: Factory, tmp_path: Path
) -> None:
    path = tmp_path / "transcript"
    async with fake_monitor() as fake:
        fake.on("boom", FakeError("no"))
        async with qmpmirror.connect(str(fake.path), transcript=path) as machine:
            fake.send_event("STOP")
            await asyncio.gather(
                machine.monitor.execute("query-name"), machine.monitor.execute("query-jobs")
            )
            with pytest.raises(qmpmirror.CommandFailed):
                await machine.monitor.execute("boom", {"a": 1})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id: dict[int, list[Any]] = {}
    for line in lines:
        if "id" in line:
            by_id.setdefault(line["id"], []).append((line["direction"], line["message"]))
    assert by_id == {
        1: [("sent", {"execute": "query-name"}), ("received", {"return": {}})],
        2: [("sent", {"execute": "query-jobs"}), ("received", {"return": []})],
        3: [
            ("sent", {"execute": "boom", "arguments": {"a": 1}}),
            ("received", {"error": {"class": "GenericError", "desc": "no"}}),
        ],
    }
    assert [line["message"]["event"] for line in lines if "id" not in line] == ["STOP"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


async def test_cancelling_a_connect_leaves_no_connection(fake_monitor: Factory) -> None:
    async with fake_monitor(no_greeting=True) as fake:
        connecting = asyncio.ensure_future(qmpmirror.connect(str(fake.path)).__aenter__())
        while not fake.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting


async def test_close_twice_is_fine(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake:
        machine = await qmpmirror.connect(str(fake.path))
        await machine.close()
        await machine.close()


async def test_a_transcript_overwrites_nothing_but_a_transcript(
    fake_monitor: Factory, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb")
    async with fake_monitor() as fake:
        with pytest.raises(qmpmirror.UsageError, match="exists already, and is no transcript"):
            await qmpmirror.connect(str(fake.path), transcript=path)
        assert path.read_bytes() == b"QFI\xfb"
        for _ in range(2):
            async with qmpmirror.connect(str(fake.path), transcript=tmp_path / "new") as machine:
                await machine.monitor.execute("query-name")
    lines = (tmp_path / "new").read_text().splitlines()
    assert [json.loads(line)["direction"] for line in lines] == ["sent", "received"]
