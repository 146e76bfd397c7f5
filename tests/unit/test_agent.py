# SPDX-License-Identifier: MIT
"""File systems are frozen through the guest's agent, and thawed whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import errors
from qmpmirror.agent import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
SYNC = "guest-sync-delimited"
OTHER = {"class": "GenericError", "desc": "no way"}


@attrs.define
class FakeAgent:
    """A ``qemu-ga`` with a script: a reply, None for silence, or an exception to hang up."""

    path: str
    script: dict[str, Any] = attrs.field(factory=lambda: {FREEZE: {"return": 2}})
    greeting: bytes = b""
    garbage: bytes = b""
    received: list[str] = attrs.field(factory=list)
    arrived: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.greeting)
        while line := await reader.readline():
            request = json.loads(line.lstrip(b"\xff"))
            command = request["execute"]
            self.received.append(command)
            self.arrived.set()
            reply = self.script.get(command, {"return": 0})
            if command == SYNC:
                writer.write(self.garbage + b"\xff")
                reply = {"return": request["arguments"]["id"]}
            if isinstance(reply, Exception):
                break
            if reply is not None:
                writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    async def has_received(self, command: str) -> None:
        while command not in self.received:
            self.arrived.clear()
            await self.arrived.wait()

    @property
    def asked(self) -> list[str]:
        return [command for command in self.received if command != SYNC]


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    made = FakeAgent(str(tmp_path / "agent"))
    async with await asyncio.start_unix_server(made.serve, made.path):
        yield made


async def test_frozen_inside_and_thawed_after(agent: FakeAgent) -> None:
    async with frozen(agent.path) as number:
        assert number == 2
        assert agent.asked == [FREEZE]
    assert agent.asked == [FREEZE, THAW]


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": 17}\n',
        b'{"return": {}}\n{"error": {"desc": "JSON parse error"}}\n',
        b"\x00\x01no JSON at all\n[]\n",
        b"half a line",
        b"\xff\xff",
    ],
)
@pytest.mark.parametrize("when", ["greeting", "garbage"])
async def test_what_an_earlier_client_left_unread_is_skipped(
    agent: FakeAgent, stale: bytes, when: str
) -> None:
    setattr(agent, when, stale)
    async with frozen(agent.path) as number:
        assert number == 2
    assert agent.asked == [FREEZE, THAW]


async def test_thawed_after_an_error_in_the_block(agent: FakeAgent) -> None:
    with pytest.raises(errors.NotReady, match="too early") as raised:
        async with frozen(agent.path):
            raise errors.NotReady("too early", job_id="")
    assert agent.asked == [FREEZE, THAW]
    assert raised.value.left == ()


async def test_thawed_when_the_block_is_cancelled(agent: FakeAgent) -> None:
    inside = asyncio.Event()

    async def hold() -> None:
        async with frozen(agent.path):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await inside.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert agent.asked == [FREEZE, THAW]


async def test_thawed_when_the_freeze_is_cancelled(agent: FakeAgent) -> None:
    agent.script[FREEZE] = None

    async def hold() -> None:
        async with frozen(agent.path):
            raise AssertionError("it never froze")

    task = asyncio.create_task(hold())
    await agent.has_received(FREEZE)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await agent.has_received(THAW)


async def test_thaw_is_sent_even_if_nobody_waits_for_its_answer(agent: FakeAgent) -> None:
    agent.script |= {FREEZE: None, THAW: None}

    async def hold() -> None:
        async with frozen(agent.path):
            raise AssertionError("it never froze")

    task = asyncio.create_task(hold())
    await agent.has_received(FREEZE)
    task.cancel()
    await agent.has_received(THAW)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_refused_freeze_is_thawed(agent: FakeAgent) -> None:
    agent.script[FREEZE] = {"error": OTHER}
    with pytest.raises(errors.Refused, match=f"refused {FREEZE}: no way") as raised:
        await _enter(agent.path)
    assert agent.asked == [FREEZE, THAW]
    assert raised.value.left == ()


async def test_a_freeze_that_is_not_answered_is_thawed(agent: FakeAgent) -> None:
    agent.script[FREEZE] = None
    with pytest.raises(errors.DeadlineExceeded, match=rf"{FREEZE} within 0\.2 s \(is it") as raised:
        await _enter(agent.path, 0.2)
    assert agent.asked == [FREEZE, THAW]
    assert raised.value.left == ()


async def test_a_late_answer_to_the_freeze_is_not_taken_for_the_thaws(agent: FakeAgent) -> None:
    agent.script[FREEZE] = None
    agent.script[THAW] = {"error": OTHER}
    agent.garbage = b'{"return": 2}\n'  # before the next reply
    with pytest.raises(errors.DeadlineExceeded) as raised:
        await _enter(agent.path, 0.2)
    (left,) = raised.value.left
    assert left.startswith("the guest's file systems may still be frozen: ")
    assert left.endswith("no way")


async def test_an_agent_that_hangs_up_leaves_it_open_whether_all_is_thawed(
    agent: FakeAgent,
) -> None:
    agent.script[FREEZE] = ConnectionError()
    with pytest.raises(errors.Refused, match=f"hung up during {FREEZE}") as raised:
        await _enter(agent.path)
    (left,) = raised.value.left
    assert "may still be frozen" in left


@pytest.mark.parametrize(
    ("reply", "words"),
    [({"error": OTHER}, "no way"), (ConnectionError(), "hung up"), (None, "did not answer")],
)
async def test_a_failed_thaw_is_an_error(agent: FakeAgent, reply: Any, words: str) -> None:
    agent.script[THAW] = reply
    with pytest.raises(errors.Refused, match=f"may still be frozen.*{words}"):
        await _enter(agent.path, 0.5)


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "No such file or directory"), ("plain", "Connection refused")]
)
async def test_no_agent(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "plain").touch()
    path = tmp_path / name
    with pytest.raises(errors.Refused, match=f"guest agent {path}: {words}"):
        await _enter(str(path))


async def test_an_agent_that_is_silent_from_the_start(tmp_path: Path) -> None:
    path = str(tmp_path / "silent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(errors.DeadlineExceeded, match="is it running in the guest"):
            await _enter(path, 0.1)


async def _enter(path: str, seconds: float = 10.0) -> None:
    async with frozen(path, seconds):
        pass
