# SPDX-License-Identifier: MIT
"""One QMP connection: deadlines, events, the transcript, and what happens when it is lost.

Everything that `qemu.qmp` does not do by itself lives here: connecting has a deadline, events are
handed out without a queue that could grow, and every wait ends when the connection does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

import attrs
from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from qmpmirror import errors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Mapping

log = logging.getLogger("qmpmirror.monitor")

T = TypeVar("T")

QUERY_SECONDS: Final = 60.0
"""How long a command that changes nothing may take."""

CHANGE_SECONDS: Final = 600.0
"""How long any other command may take: block commands wait for storage, in QEMU's main loop."""

_START: Final = b'{"time":'

CLOSE_SECONDS: Final = 5.0
"""How long saying goodbye may take."""

MAX_REPLY: Final = 64 * 1024 * 1024
"""Bytes; a longer reply would end the connection."""


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.wait_for`, which before Python 3.12 can swallow a cancellation: Ctrl-C, for one.

    Args:
        seconds: the deadline.
        work: what to wait for; cancelled when it is not done in time.

    Raises:
        asyncio.TimeoutError: it was not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it counts as seen, should the wait have been cancelled


class Client(QMPClient):
    """A `QMPClient` that keeps no events and survives one that precedes the session."""

    def __init__(self) -> None:
        super().__init__("qmpmirror", readbuflen=MAX_REPLY)
        # The built-in listener keeps every event for ever, twice.
        self.events.event_filter = lambda _event: False

    async def _recv(self) -> Message:
        # QEMU may send an event before the greeting or before the reply to qmp_capabilities.
        message = await super()._recv()
        while self.runstate is not Runstate.RUNNING and "event" in message:
            message = await super()._recv()
        return message

    async def _do_recv(self) -> Message:
        # -qmp-pretty spreads a message over many lines; qemu.qmp takes each for one.
        lines = [await self._readline()]
        if lines[0].rstrip() == b"{":
            while lines[-1].rstrip() != b"}":
                lines.append(await self._readline())
        return Message(b"".join(lines), eager=True)


@attrs.frozen
class Event:
    """A QMP event.

    Attributes:
        name: such as ``JOB_STATUS_CHANGE``.
        data: its data, empty when it has none.
        seconds: QEMU's own time stamp, in seconds since the epoch.
    """

    name: str
    data: Mapping[str, Any]
    seconds: float

    @classmethod
    def parse(cls, message: Message) -> Event:
        """From the message as it came."""
        stamp: Any = message.get("timestamp") or {}
        data: Any = message.get("data") or {}
        seconds = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        return cls(str(message["event"]), data, seconds)


@attrs.frozen
class Transcript:
    """Writes everything that passes over a monitor to a file, one JSON object a line.

    Each line has ``time`` (seconds since the start), ``direction`` (``sent`` or ``received``), and
    the ``message``; a command and its reply carry the same ``id``.
    """

    _file: TextIO
    _start: float = attrs.field(factory=time.monotonic)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Transcript:
        """A transcript in a file of its own.

        An earlier transcript is overwritten, any other file is not.

        Raises:
            UsageError: the file cannot be written, or holds something else.
        """
        try:
            with open(path, "rb") as there:
                start = there.read(len(_START))
        except OSError:
            start = b""
        if start not in {b"", _START}:
            raise errors.UsageError(f"transcript {path} exists already, and is no transcript")
        try:
            return cls(open(path, "w", encoding="utf-8"))
        except OSError as error:
            raise errors.UsageError(f"transcript {path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; what passes later is not written."""
        self._file.close()

    def write(self, direction: str, message: Mapping[str, Any], serial: int | None = None) -> None:
        """Add a line, at once."""
        if self._file.closed:
            return
        line: dict[str, Any] = {
            "time": round(time.monotonic() - self._start, 6),
            "direction": direction,
        }
        if serial is not None:
            line["id"] = serial
        line["message"] = message
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@attrs.define(eq=False)
class Monitor:
    """A QMP connection in use.

    Attributes:
        client: the `qemu.qmp.QMPClient`, connected.
        address: how the user would reach it again, for messages.
        pid: the process behind a unix socket, if known.
        owned: whether `close()` disconnects the client.
        transcript: where everything that passes is written; `close()` closes it.
        loss: why the connection ended; None while it stands.
    """

    client: QMPClient
    address: str = "the monitor"
    pid: int | None = None
    owned: bool = False
    transcript: Transcript | None = None
    loss: errors.ConnectionLost | None = attrs.field(default=None, init=False)
    _subscribers: list[Callable[[Event | None], None]] = attrs.field(factory=list, init=False)
    _listener: EventListener = attrs.field(init=False)
    _watch: asyncio.Task[None] = attrs.field(init=False)
    _serial: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        # A filter that refuses everything: events are handed out in it, and never stored.
        self._listener = EventListener(event_filter=self._hand_out)
        self.client.register_listener(self._listener)
        self._watch = asyncio.create_task(self._watch_connection(), name="qmpmirror-watch")

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
    ) -> Any:
        """Execute a command and return what QEMU returned.

        Cancelling this is safe for the connection, but QEMU may still carry the command out.

        Args:
            command: the QMP command.
            arguments: its arguments.
            seconds: how long to wait for the reply; by default `QUERY_SECONDS` for commands that
                change nothing and `CHANGE_SECONDS` for the others.

        Raises:
            CommandFailed: QEMU's error reply.
            CommandTimeout: no reply in time.
            ConnectionLost: the connection ended; the command may have run.
        """
        if seconds is None:
            seconds = QUERY_SECONDS if command.startswith(("query-", "qom-")) else CHANGE_SECONDS
        arguments = dict(arguments or {})
        self._serial += 1
        serial = self._serial
        self._record("sent", _message(command, arguments), serial)
        try:
            reply = await within(seconds, self.client.execute(command, arguments))
        except asyncio.TimeoutError:
            raise errors.CommandTimeout(command, seconds) from None
        except ExecuteError as error:
            reason, error_class = str(error), error.error_class
            self._record("received", {"error": {"class": error_class, "desc": reason}}, serial)
            raise errors.CommandFailed(command, arguments, reason, error_class) from None
        except (ExecInterruptedError, StateError, QMPError, OSError, EOFError) as error:
            raise self._lost(command, error) from error
        self._record("received", {"return": reply}, serial)
        return reply

    def subscribe(self, handler: Callable[[Event | None], None]) -> Callable[[], None]:
        """Call ``handler`` with every event, and with None once when the connection is lost.

        The handler is called in the order of the wire and must not block. Events that QEMU sent
        before this call are gone: subscribe first, then send the command that causes the event.

        Returns:
            A function that ends the subscription.
        """
        self._subscribers.append(handler)

        def unsubscribe() -> None:
            with suppress(ValueError):
                self._subscribers.remove(handler)

        return unsubscribe

    async def close(self) -> None:
        """Let go of the connection. Running jobs go on. Does nothing the second time."""
        if self.client.runstate is Runstate.RUNNING:
            self._watch.cancel()
        # Else it is about to disconnect: cut short, qemu.qmp leaves the error of its reader behind.
        await asyncio.wait({self._watch}, timeout=CLOSE_SECONDS)
        self._watch.cancel()
        with suppress(ValueError, QMPError):
            self.client.remove_listener(self._listener)
        if self.owned:
            # disconnect() raises whatever ended the connection; here it has ended anyway.
            with suppress(QMPError, OSError, EOFError, ValueError, asyncio.TimeoutError):
                await asyncio.wait_for(self.client.disconnect(), CLOSE_SECONDS)
        if self.transcript is not None:
            self.transcript.close()

    def _hand_out(self, message: Message) -> bool:
        self._record("received", dict(message))
        event = Event.parse(message)
        for handler in tuple(self._subscribers):
            handler(event)
        return False

    async def _watch_connection(self) -> None:
        # runstate_changed() tells of changes only, so the state is looked at first.
        while self.client.runstate is Runstate.RUNNING:
            await self.client.runstate_changed()
        cause: BaseException | None = None
        if self.owned:
            try:
                await self.client.disconnect()
            except (QMPError, OSError, EOFError, ValueError) as error:
                cause = error
        self.loss = self._lost("", cause)
        log.info("%s", self.loss)
        for handler in tuple(self._subscribers):
            handler(None)

    def _lost(self, command: str, cause: BaseException | None) -> errors.ConnectionLost:
        why = "" if cause is None or not str(cause) else f": {cause}"
        during = f" during {command}" if command else ""
        return errors.ConnectionLost(
            f"the connection to {self.address} was lost{during}{why}", command=command
        )

    def _record(
        self, direction: str, message: Mapping[str, Any], serial: int | None = None
    ) -> None:
        log.debug("%s %s", direction, message)
        if self.transcript is not None:
            self.transcript.write(direction, message, serial)


def _message(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"execute": command, "arguments": arguments} if arguments else {"execute": command}
