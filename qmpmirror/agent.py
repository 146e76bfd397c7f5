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
from qmpmirror.monitor import within

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

    async def freeze(self) -> int:
        """Freeze the guest's file systems; return how many (``guest-fsfreeze-freeze``)."""
        return int(await self._execute("guest-fsfreeze-freeze"))

    async def thaw(self) -> None:
        """Thaw them (``guest-fsfreeze-thaw``); it is sent in any case."""
        await self._execute("guest-fsfreeze-thaw")

    async def _execute(self, command: str) -> Any:
        """Execute one of the agent's commands, whatever an earlier one has left unread.

        Raises:
            Refused: the agent's error reply, or that it hung up.
            DeadlineExceeded: no reply in time.
        """
        number = secrets.randbelow(2**31)
        self._send("guest-sync-delimited", {"id": number})
        self._send(command)
        while _parsed(await self._line(command)).get("return") != number:
            pass
        reply = _parsed(await self._line(command))
        if "return" not in reply:
            error = reply.get("error")
            reason = error.get("desc") if isinstance(error, dict) else reply
            raise errors.Refused(f"the guest agent refused {command}: {reason}")
        return reply["return"]

    def _send(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        # The sentinel makes the agent forget a half-sent command of an earlier client.
        start = _SENTINEL if arguments else b""
        self._writer.write(start + json.dumps(message).encode() + b"\n")

    async def _line(self, command: str) -> bytes:
        try:
            line = await within(self._seconds, self._reader.readline())
        except asyncio.TimeoutError:
            raise errors.DeadlineExceeded(
                f"the guest agent did not answer {command} within {self._seconds:g} s",
                hint="is it running in the guest?",
            ) from None
        except (OSError, ValueError):  # it was reset, or the line is endless
            line = b""
        if not line:
            raise errors.Refused(f"the guest agent hung up during {command}")
        return line


def _parsed(line: bytes) -> dict[str, Any]:
    """A reply; garbage is an empty one."""
    try:
        reply = json.loads(line.rpartition(_SENTINEL)[2])
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


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
        reader, writer = await within(seconds, asyncio.open_unix_connection(path))
    except asyncio.TimeoutError:
        raise errors.DeadlineExceeded(f"guest agent {path}: nobody answers") from None
    except OSError as error:
        raise errors.Refused(f"guest agent {path}: {error.strerror}") from None
    agent = Agent(reader, writer, seconds)
    try:
        try:
            yield await agent.freeze()
        except BaseException as error:
            # Also when the freeze was not answered: it may have been carried out.
            trouble = await _thaw(agent)
            if isinstance(error, errors.Error):
                error.left += trouble
            raise
        if trouble := await _thaw(agent):
            raise errors.Refused(trouble[0])
    finally:
        writer.close()


async def _thaw(agent: Agent) -> tuple[str, ...]:
    """Thaw; say so if that is not certain."""
    try:
        await agent.thaw()
    except errors.Error as error:
        return (f"the guest's file systems may still be frozen: {error.description}",)
    return ()
