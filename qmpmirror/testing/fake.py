# SPDX-License-Identifier: MIT
"""A QMP server that does what a test says, for all that a real QEMU cannot be made to do.

It answers from a script, or it stands in front of a real QEMU (``upstream``) and changes only what
the test wants changed: another version, a lost reply, a broken line.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror.testing.fake_client import Client
from qmpmirror.testing.script import (
    FakeError,
    Fault,
    Message,
    Received,
    Script,
    event,
    load_schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["FakeError", "FakeMonitor", "Fault", "Received", "event", "load_schema"]

_DEFAULT_VERSION = (10, 0, 0)
_LIMIT = 64 * 1024 * 1024


@attrs.define(eq=False, kw_only=True)
class FakeMonitor:
    """A scriptable QMP server on a unix socket.

    ::

        async with FakeMonitor(path=tmp_path / "qmp", version=(8, 2, 0)) as fake:
            fake.on("query-jobs", [], FakeError("out of memory"))
            ...
            assert fake.commands == ["qmp_capabilities", "query-jobs"]

    It must be left in the event loop that it was entered in. An error in one of the test's own
    functions closes the connection and is raised again on leaving.

    Attributes:
        path: The socket.
        version: The version in the greeting and in ``query-version``; None is that of the upstream,
            or 10.0.0.
        schema: The reply to ``query-qmp-schema``, or a file that holds it (see `load_schema`); None
            is that of the upstream, or an empty one.
        upstream: QMP socket of a real QEMU that executes what no script answers. It serves one
            client at a time, so do we then.
        one_client: Whether a second connection waits, without a greeting, until the first one has
            gone, as with QEMU; else all are served.
        greeting_delay: Seconds until the greeting.
        no_greeting: Whether there is never a greeting.
        garbage: Bytes that are sent in place of the greeting.
        half_line_then_close: Whether the connection is closed in the middle of the greeting.
        event_before_greeting: An event (see `event`) that is sent before the greeting.
        event_before_capabilities_reply: One that is sent before the reply to ``qmp_capabilities``.
        duplicate_event: Whether every event is sent twice.
        lost_events: Names of events that are never sent.
        received: The commands so far.
    """

    path: Path = attrs.field(converter=Path)
    version: tuple[int, int, int] | None = None
    schema: Sequence[Message] | Path | None = None
    upstream: Path | None = None
    one_client: bool = True
    greeting_delay: float = 0.0
    no_greeting: bool = False
    garbage: bytes = b""
    half_line_then_close: bool = False
    event_before_greeting: Message | None = None
    event_before_capabilities_reply: Message | None = None
    duplicate_event: bool = False
    lost_events: set[str] = attrs.field(converter=set, factory=set)
    received: list[Received] = attrs.field(init=False, factory=list)
    _scripts: dict[str, list[Script]] = attrs.field(init=False, factory=dict)
    _faults: dict[str, Fault] = attrs.field(init=False, factory=dict)
    _later: list[Callable[[], object]] = attrs.field(init=False, factory=list)
    _clients: list[Client] = attrs.field(init=False, factory=list)
    _accepted: int = attrs.field(default=0, init=False)
    _tasks: set[asyncio.Task[None]] = attrs.field(init=False, factory=set)
    _turn: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock)
    _arrival: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _crashed: bool = attrs.field(init=False, default=False)
    _server: asyncio.Server | None = attrs.field(init=False, default=None)
    _errors: list[Exception] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if self.version is not None or self.upstream is None:
            self.on("query-version", lambda _: self._version())
        if self.schema is not None or self.upstream is None:
            schema = load_schema(self.schema) if isinstance(self.schema, Path) else self.schema
            self.on("query-qmp-schema", list(schema or []))
        if self.upstream is None:
            self.on("qmp_capabilities", {})
            for name in ("block", "named-block-nodes", "jobs", "block-jobs", "block-exports"):
                self.on(f"query-{name}", [])
            self.on("query-name", {})
            self.on("query-status", {"status": "running", "running": True})
            self.on("query-commands", lambda _: [{"name": name} for name in sorted(self._scripts)])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path, limit=_LIMIT)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.crash()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)
        if self._errors and error is None:
            raise self._errors[0]

    # -- the script ------------------------------------------------------------------------------

    def on(self, command: str, *replies: Script) -> None:
        """Say how a command is answered; what was said before is forgotten.

        Args:
            command: Name of the command.
            replies: The reply to the first such command, to the second and so on (see `Script`);
                the last one serves all further ones.
        """
        if not replies:
            raise ValueError(f"no reply to {command}")
        self._scripts[command] = [*replies]

    def forget(self, command: str) -> None:
        """Take back what was said: the upstream answers again, or nobody."""
        self._scripts.pop(command, None)

    def fault(self, command: str, **fault: Any) -> None:
        """Let something go wrong with the reply to a command (see `Fault`)."""
        self._faults[command] = Fault(**fault)

    def drop_reply(self, command: str) -> None:
        """Execute a command, but never reply."""
        self.fault(command, drop=True)

    def delay_reply(self, command: str, seconds: float) -> None:
        """Execute a command, and reply late."""
        self.fault(command, delay=seconds)

    def close_after(self, command: str, *, reply: bool = True) -> None:
        """Execute a command and close the connection, with or without a reply before."""
        self.fault(command, drop=not reply, close=True)

    def after_reply(self, action: Callable[[], object]) -> None:
        """From within a reply: do something (send an event, say) once this reply is out."""
        self._later.append(action)

    def send_event(self, name: str, data: dict[str, Any] | None = None, /, **keywords: Any) -> None:
        """Send an event to the clients that have negotiated, as QEMU would.

        Args:
            name: Name of the event.
            data: Data that are sent as they are.
            keywords: Data whose underscores become dashes.
        """
        for client in self._clients:
            if client.negotiated:
                self._pass_on(client, event(name, data, **keywords))

    def send_raw(self, data: bytes) -> None:
        """Send any bytes to all clients that are being served."""
        for client in self._clients:
            if client.served:
                client.send(data)

    def disconnect(self) -> None:
        """Hang up on all clients; they may connect again."""
        for client in self._clients:
            client.close()

    def crash(self) -> None:
        """Hang up on all clients, and refuse new ones, as a QEMU that died. Idempotent."""
        self._crashed = True
        for client in self._clients:
            client.abort()
        # The server goes on for those that it is just accepting; asyncio would forget them.
        self.path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as nobody_listens:
            nobody_listens.bind(str(self.path))

    # -- what happened ---------------------------------------------------------------------------

    @property
    def commands(self) -> list[str]:
        """Names of the commands so far."""
        return [command.name for command in self.received]

    @property
    def accepted(self) -> int:
        """How many clients have connected so far."""
        return self._accepted

    @property
    def connected(self) -> int:
        """How many clients are being served."""
        return sum(client.served for client in self._clients)

    def is_at_least(self, *version: int) -> bool:
        """Whether the version that the server shows is this one or a newer one."""
        return (self.version or _DEFAULT_VERSION) >= version

    def arguments_of(self, command: str) -> list[dict[str, Any]]:
        """The arguments of each such command so far."""
        return [received.arguments for received in self.received if received.name == command]

    async def wait_for(self, command: str, count: int = 1) -> Received:
        """Wait until a command has come ``count`` times, and return the last one of these."""
        while self.commands.count(command) < count:
            self._arrival.clear()
            await self._arrival.wait()
        return [received for received in self.received if received.name == command][count - 1]

    # -- the server ------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._crashed:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(Client(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Client) -> None:
        queue = self.one_client or self.upstream is not None
        self._clients.append(client)
        self._accepted += 1
        try:
            async with self._turn if queue else contextlib.nullcontext():
                client.served = True
                await self._greet(client)
                await self._converse(client)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client's way to leave
        except Exception as error:  # noqa: BLE001 - an error of the test's, raised on leaving
            self._errors.append(error)
        finally:
            self._clients.remove(client)
            client.close()
            await client.closed()

    async def _greet(self, client: Client) -> None:
        greeting: Message = {"QMP": {"version": self._version(), "capabilities": ["oob"]}}
        if self.upstream is not None:
            client.upstream = await asyncio.open_unix_connection(self.upstream, limit=_LIMIT)
            greeting = json.loads(await client.upstream[0].readuntil(b"\n"))
            client.pump = asyncio.get_running_loop().create_task(self._pump(client))
            if self.version is not None:
                greeting["QMP"]["version"] = self._version()
        await asyncio.sleep(self.greeting_delay)
        if self.event_before_greeting is not None:
            client.send(self.event_before_greeting)
        if self.garbage:
            client.send(self.garbage)
        elif self.half_line_then_close:
            client.send_half(greeting)
        elif not self.no_greeting:
            client.send(greeting)

    async def _converse(self, client: Client) -> None:
        async for request in client.requests():
            try:
                command = request.get("exec-oob") or request["execute"]
                received = Received(command, request.get("arguments", {}))
            except (KeyError, TypeError, AttributeError):
                error = {"class": "GenericError", "desc": "JSON parse error, expecting value"}
                client.send({"error": error})
                continue
            self.received.append(received)
            self._arrival.set()
            if command in self._scripts or client.upstream is None:
                reply = await self._run_script(client, received)
                if "id" in request:
                    reply["id"] = request["id"]
                await self._reply(client, received, reply)
            else:
                client.forwarded.put_nowait(received)
                client.upstream[1].write(json.dumps(request).encode() + b"\n")
                # One at a time, as in QEMU: the order of scripted and real replies stays.
                await client.forwarded.join()

    async def _pump(self, client: Client) -> None:
        """Pass on what the real QEMU sends, in its order, until it hangs up."""
        assert client.upstream is not None  # noqa: S101 - for mypy
        try:
            while line := await client.upstream[0].readline():
                message: Message = json.loads(line)
                if "event" in message:
                    self._pass_on(client, message)
                else:
                    await self._reply(client, client.forwarded.get_nowait(), message)
                    client.forwarded.task_done()
        except ConnectionError:
            pass  # QEMU's way to die
        except Exception as error:  # noqa: BLE001 - an error of the test's, raised on leaving
            self._errors.append(error)
        client.close()
        while client.forwarded.qsize():
            client.forwarded.get_nowait()
            client.forwarded.task_done()

    async def _run_script(self, client: Client, received: Received) -> Message:
        try:
            script = self._script(client, received.name)
            value = script(received.arguments) if callable(script) else script
            return {"return": await value if inspect.isawaitable(value) else value}
        except FakeError as error:
            return {"error": {"class": error.error_class, "desc": error.description}}

    def _script(self, client: Client, command: str) -> Script:
        if client.upstream is None and client.negotiated == (command == "qmp_capabilities"):
            raise FakeError(_NEGOTIATION[client.negotiated], "CommandNotFound")
        if command not in self._scripts:
            raise FakeError(f"The command {command} has not been found", "CommandNotFound")
        scripts = self._scripts[command]
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        if isinstance(script, FakeError):
            raise script
        return script

    async def _reply(self, client: Client, received: Received, reply: Message) -> None:
        fault = self._faults.get(received.name, Fault())
        if fault.once:
            del self._faults[received.name]
        if received.name == "qmp_capabilities" and "return" in reply:
            if self.event_before_capabilities_reply is not None:
                client.send(self.event_before_capabilities_reply)
            client.negotiated = True
        await asyncio.sleep(fault.delay)
        if fault.half:
            client.send_half(reply)
        elif fault.corrupt:
            client.send(json.dumps(reply)[:-1].encode() + b"\r\n")
        elif not fault.drop:
            for _ in range(1 + fault.duplicate):
                client.send(reply)
        if fault.close:
            client.close()
        later, self._later = self._later, []
        for action in later:
            action()
        with contextlib.suppress(ConnectionError):
            await client.writer.drain()

    def _pass_on(self, client: Client, message: Message) -> None:
        if message["event"] not in self.lost_events:
            for _ in range(1 + self.duplicate_event):
                client.send(message)

    def _version(self) -> Message:
        major, minor, micro = self.version or _DEFAULT_VERSION
        return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": ""}


_NEGOTIATION = {
    False: "Expecting capabilities negotiation with 'qmp_capabilities'",
    True: "Capabilities negotiation is already complete, command ignored",
}
