# SPDX-License-Identifier: MIT
"""The guest agent, for file systems that stand still around a cut."""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGENT_SECONDS: Final = 10.0
"""How long the agent may take for an answer, a freeze included."""

_SENTINEL: Final = b"\xff"


@attrs.define
class Agent:
    """A connection to a ``qemu-ga`` by the socket that QEMU gives it."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _seconds: float

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Execute one of the agent's commands.

        Raises:
            Refused: the agent's error reply.
            DeadlineExceeded: no reply in time.
        """
        message = {"execute": command, "arguments": arguments}
        self._writer.write(json.dumps(message).encode() + b"\n")
        reply = json.loads(await self._line(command))
        if "error" in reply:
            raise errors.Refused(f"the guest agent refused {command}: {reply['error']['desc']}")
        return reply.get("return")

    async def synchronize(self) -> None:
        """Leave behind what an earlier client has not read (``guest-sync-delimited``)."""
        number = secrets.randbelow(2**31)
        message = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._writer.write(_SENTINEL + json.dumps(message).encode() + b"\n")
        while True:
            line = await self._line("guest-sync-delimited")
            reply = json.loads(line.rpartition(_SENTINEL)[2] or b"{}")
            if reply.get("return") == number:
                return

    async def _line(self, command: str) -> bytes:
        try:
            line = await asyncio.wait_for(self._reader.readline(), self._seconds)
        except asyncio.TimeoutError:
            raise errors.DeadlineExceeded(
                f"the guest agent did not answer {command} within {self._seconds:g} s",
                hint="is it running in the guest?",
            ) from None
        if not line:
            raise errors.Refused(f"the guest agent hung up during {command}")
        return line


@asynccontextmanager
async def frozen(path: str, seconds: float = AGENT_SECONDS) -> AsyncIterator[int]:
    """Freeze the guest's file systems while the block lasts; they are thawed whatever happens.

    Args:
        path: the agent's unix socket.
        seconds: how long each answer may take.

    Yields:
        How many file systems are frozen.

    Raises:
        Refused: there is no agent, or it refused.
        DeadlineExceeded: it did not answer.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise errors.Refused(f"guest agent {path}: {error.strerror}") from None
    agent = Agent(reader, writer, seconds)
    try:
        await agent.synchronize()
        try:
            yield await agent.execute("guest-fsfreeze-freeze")
        finally:
            # Also when the freeze was not answered: it may have been carried out.
            await agent.execute("guest-fsfreeze-thaw")
    finally:
        writer.close()
