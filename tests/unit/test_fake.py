# SPDX-License-Identifier: MIT
"""The fake monitor, talked to by a plain stream and by the client library itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from qmpmirror.testing.fake import FakeError, FakeMonitor, event, load_schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    Factory = Callable[..., FakeMonitor]


class Stream:
    """A client that shows each line as it is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, command: str, **arguments: Any) -> None:
        self.write(json.dumps({"execute": command, "arguments": arguments, "id": command}))

    def write(self, text: str) -> None:
        self.writer.write(text.encode())

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 10)

    async def message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.line())
        return message

    async def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.send(command, **arguments)
        return await self.message()


@contextlib.asynccontextmanager
async def stream(fake: FakeMonitor, *, negotiate: bool = True) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_unix_connection(fake.path)
    client = Stream(reader, writer)
    try:
        if negotiate:
            assert "QMP" in await client.message()
            assert "return" in await client.execute("qmp_capabilities")
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_client_library_connects_executes_and_leaves(fake_monitor: Factory) -> None:
    async with fake_monitor(version=(8, 2, 1)) as fake:
        client = QMPClient()
        await client.connect(str(fake.path))
        reply: Any = await client.execute("query-version")
        await client.disconnect()
    assert reply["qemu"] == {"major": 8, "minor": 2, "micro": 1}
    assert fake.commands == ["qmp_capabilities", "query-version"]


async def test_client_library_gets_events(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake:
        client, listener = QMPClient(), EventListener()
        await client.connect(str(fake.path))
        with client.listen(listener):
            fake.send_event("BLOCK_IO_ERROR", {"qom_path": 1}, node_name="n")
            message = await asyncio.wait_for(listener.get(), 10)
        await client.disconnect()
    assert message["event"] == "BLOCK_IO_ERROR"
    assert message["data"] == {"qom_path": 1, "node-name": "n"}
    assert set(message["timestamp"]) == {"seconds", "microseconds"}  # type: ignore[call-overload]


async def test_replies_come_in_turn_and_the_last_one_stays(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        fake.on("query-jobs", [{"id": "a"}], FakeError("no", "DeviceNotActive"), [])
        replies = [await client.execute("query-jobs") for _ in range(4)]
    assert [reply.get("return", reply.get("error")) for reply in replies] == [
        [{"id": "a"}],
        {"class": "DeviceNotActive", "desc": "no"},
        [],
        [],
    ]
    assert {reply["id"] for reply in replies} == {"query-jobs"}


async def test_reply_may_be_a_function_or_a_coroutine(fake_monitor: Factory) -> None:
    async def slow(arguments: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"slow": arguments["x"]}

    def refuse(arguments: dict[str, Any]) -> None:
        raise FakeError(f"not {arguments['x']}")

    async with fake_monitor() as fake, stream(fake) as client:
        fake.on("a", lambda arguments: arguments["x"])
        fake.on("b", slow)
        fake.on("c", refuse)
        assert (await client.execute("a", x=1))["return"] == 1
        assert (await client.execute("b", x=2))["return"] == {"slow": 2}
        assert (await client.execute("c", x=3))["error"]["desc"] == "not 3"
    assert fake.arguments_of("b") == [{"x": 2}]


async def test_refusals_are_those_of_qemu(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake, negotiate=False) as client:
        await client.message()
        early = await client.execute("query-jobs")
        assert early["error"]["class"] == "CommandNotFound"
        await client.execute("qmp_capabilities")
        assert "already complete" in (await client.execute("qmp_capabilities"))["error"]["desc"]
        unknown = await client.execute("no-such")
        assert unknown["error"] == {
            "class": "CommandNotFound",
            "desc": "The command no-such has not been found",
        }
        client.write("nonsense\n")
        assert "JSON parse error" in (await client.message())["error"]["desc"]
        client.write("7\n")
        assert "JSON parse error" in (await client.message())["error"]["desc"]
        assert "return" in await client.execute("query-jobs")


async def test_commands_need_no_end_of_line_and_may_come_in_pieces(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        client.write('{"execute": "query-')
        await client.writer.drain()
        client.write('jobs", "id": 1}{"execute": "query-block", "id": 2}')
        assert [(await client.message())["id"] for _ in range(2)] == [1, 2]


async def test_events_before_the_greeting_and_before_the_capabilities_reply(
    fake_monitor: Factory,
) -> None:
    async with (
        fake_monitor(
            event_before_greeting=event("RESUME"), event_before_capabilities_reply=event("STOP")
        ) as fake,
        stream(fake, negotiate=False) as client,
    ):
        assert (await client.message())["event"] == "RESUME"
        assert "QMP" in await client.message()
        fake.send_event("NOT_YET")
        assert (await client.execute("qmp_capabilities"))["event"] == "STOP"
        assert "return" in await client.message()
        fake.send_event("NOW")
        assert (await client.message())["event"] == "NOW"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"garbage": b"\xff\x00 SSH-2.0\r\n"}, b"\xff\x00 SSH-2.0\r\n"),
        ({"half_line_then_close": True}, b'{"QMP": {"version"'),
    ],
)
async def test_broken_greeting(
    fake_monitor: Factory, options: dict[str, Any], expected: bytes
) -> None:
    async with fake_monitor(**options) as fake, stream(fake, negotiate=False) as client:
        line = await client.line()
        assert line.startswith(expected)
        assert line.endswith(b"\n") is ("garbage" in options)
        client.writer.close()
        with pytest.raises(QMPError):
            await QMPClient().connect(str(fake.path))


async def test_no_greeting_and_late_greeting(fake_monitor: Factory) -> None:
    async with fake_monitor(no_greeting=True) as fake, stream(fake, negotiate=False) as client:
        # It is served and stays silent: its first line answers its first command.
        assert (await client.execute("no-such"))["id"] == "no-such"
    async with fake_monitor(greeting_delay=3600) as fake, stream(fake, negotiate=False) as client:
        greeting = asyncio.ensure_future(client.message())
        done, _ = await asyncio.wait({greeting}, timeout=0.05)
        assert not done
        assert fake.connected == 1
        greeting.cancel()


async def test_second_client_waits_for_the_first_one_to_leave(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake, negotiate=False) as second_or_first:
        await second_or_first.message()
        async with stream(fake, negotiate=False) as waiting:
            greeting = asyncio.ensure_future(waiting.message())
            await second_or_first.execute("qmp_capabilities")
            assert fake.connected == 1
            assert not greeting.done()
            second_or_first.writer.close()
            assert "QMP" in await greeting


async def test_all_clients_are_served_if_wanted(fake_monitor: Factory) -> None:
    async with (
        fake_monitor(one_client=False) as fake,
        stream(fake) as one,
        stream(fake) as other,
    ):
        assert fake.connected == 2
        fake.send_event("STOP")
        assert (await one.message())["event"] == (await other.message())["event"] == "STOP"


async def test_lost_and_duplicate_events(fake_monitor: Factory) -> None:
    async with (
        fake_monitor(duplicate_event=True, lost_events={"STOP"}) as fake,
        stream(fake) as client,
    ):
        fake.send_event("STOP")
        fake.send_event("RESUME")
        assert [(await client.message())["event"] for _ in range(2)] == ["RESUME"] * 2
        assert "return" in await client.execute("query-jobs")


async def test_reply_that_never_comes(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        fake.drop_reply("query-block")
        client.send("query-block")
        assert (await client.execute("query-jobs"))["id"] == "query-jobs"
    assert fake.commands[1:] == ["query-block", "query-jobs"]


async def test_late_reply_holds_up_what_follows(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        fake.delay_reply("query-block", 0.05)
        client.send("query-block")
        client.send("query-jobs")
        assert [(await client.message())["id"] for _ in range(2)] == ["query-block", "query-jobs"]


@pytest.mark.parametrize("reply", [True, False])
async def test_connection_closed_after_a_command(fake_monitor: Factory, *, reply: bool) -> None:
    async with fake_monitor() as fake:
        fake.close_after("query-block", reply=reply)
        async with stream(fake) as client:
            client.send("query-block")
            assert (b"return" in await client.line()) is reply
            assert await client.line() == b""
        async with stream(fake) as client:
            assert "return" in await client.execute("query-jobs")
    assert fake.commands.count("query-block") == 1


async def test_half_a_reply_once(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake:
        fake.fault("query-block", half=True, once=True)
        async with stream(fake) as client:
            client.send("query-block")
            line = await client.line()
            assert line.startswith(b"{")
            assert not line.endswith(b"\n")
        async with stream(fake) as client:
            assert "return" in await client.execute("query-block")


async def test_huge_reply(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake:
        fake.on("query-block", ["x" * (11 << 20)])
        client = QMPClient()
        await client.connect(str(fake.path))
        with pytest.raises(ExecInterruptedError):
            await client.execute("query-block")
        with contextlib.suppress(Exception):
            await client.disconnect()


async def test_raw_bytes(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        fake.send_raw(b"\x00\n")
        assert await client.line() == b"\x00\n"


async def test_hang_up_lets_clients_connect_again_and_crash_does_not(
    fake_monitor: Factory,
) -> None:
    async with fake_monitor() as fake:
        async with stream(fake) as client:
            fake.disconnect()
            assert await client.line() == b""
        async with stream(fake) as client, stream(fake, negotiate=False) as waiting:
            fake.crash()
            for each in (client, waiting):
                with contextlib.suppress(ConnectionResetError):
                    assert await each.line() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(fake.path)


async def test_wait_for_a_command(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        waiting = asyncio.ensure_future(fake.wait_for("query-block", count=2))
        await client.execute("query-block", flat=True)
        await client.execute("query-jobs")
        assert not waiting.done()
        await client.execute("query-block", flat=False)
        assert (await waiting).arguments == {"flat": False}


async def test_error_in_the_script_is_raised_on_leaving(fake_monitor: Factory) -> None:
    async def meet_the_error() -> None:
        async with fake_monitor() as fake, stream(fake) as client:
            fake.on("query-block", lambda _: 1 // 0)
            client.send("query-block")
            assert await client.line() == b""

    with pytest.raises(ZeroDivisionError):
        await meet_the_error()


async def test_schema_from_a_value_and_from_a_file(fake_monitor: Factory, tmp_path: Path) -> None:
    entity = {"meta-type": "command", "name": "stop", "arg-type": "0", "ret-type": "0"}
    async with fake_monitor(schema=[entity]) as fake, stream(fake) as client:
        assert (await client.execute("query-qmp-schema"))["return"] == [entity]
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"return": [entity]}))
    async with fake_monitor(schema=path) as fake, stream(fake) as client:
        assert (await client.execute("query-qmp-schema"))["return"] == [entity]
    assert load_schema(path) == [entity]


async def test_client_that_gives_up_while_it_waits(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake, stream(fake) as client:
        async with stream(fake, negotiate=False):
            pass
        assert "return" in await client.execute("query-jobs")
        client.writer.close()
        async with stream(fake) as next_one:
            assert "return" in await next_one.execute("query-jobs")


async def test_refusal_through_the_client_library(fake_monitor: Factory) -> None:
    async with fake_monitor() as fake:
        client = QMPClient()
        await client.connect(str(fake.path))
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("no-such")
        await client.disconnect()
