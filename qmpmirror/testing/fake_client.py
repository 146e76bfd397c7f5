# SPDX-License-Identifier: MIT
"""One client of a fake QMP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.testing.script import Message, Received

_CHUNK = 64 * 1024


@attrs.define(eq=False)
class Client:
    """A connection, and with an upstream the connection there that belongs to it.

    Attributes:
        reader: From the client.
        writer: To the client.
        upstream: The same to the real QEMU.
        pump: What passes on the real QEMU's messages.
        forwarded: The commands that the real QEMU has not replied to.
        served: Whether it is the client's turn.
        negotiated: Whether the client has left capabilities negotiation, and so gets events.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    pump: asyncio.Task[None] | None = None
    forwarded: asyncio.Queue[Received] = attrs.field(factory=asyncio.Queue)
    served: bool = False
    negotiated: bool = False

    async def requests(self) -> AsyncIterator[Any]:
        """What the client sends, value by value, until it hangs up; None is what is no JSON.

        Like QEMU, this needs no end of line: a client may leave it out.
        """
        decoder, text = json.JSONDecoder(), ""
        while chunk := await self.reader.read(_CHUNK):
            text += chunk.decode(errors="replace")
            while text := text.lstrip():
                try:
                    request, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    if not chunk.endswith(b"\n"):
                        break  # the rest of it is still to come
                    request, end = None, len(text)
                text = text[end:]
                yield request

    def send(self, message: Message | bytes) -> None:
        """Send a message, or any bytes, unless the client has gone."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
        if not self.writer.is_closing():
            self.writer.write(line)

    def send_half(self, message: Message) -> None:
        """Send the first half of a message and hang up."""
        line = json.dumps(message).encode()
        self.send(line[: len(line) // 2])
        self.close()

    @property
    def writers(self) -> list[asyncio.StreamWriter]:
        """Both directions' ways out: to the client, and to the upstream."""
        return [self.writer, *([self.upstream[1]] if self.upstream else [])]

    def close(self) -> None:
        """Hang up once all that was sent has gone out."""
        for writer in self.writers:
            writer.close()

    def abort(self) -> None:
        """Hang up at once."""
        for writer in self.writers:
            writer.transport.abort()

    async def closed(self) -> None:
        """Wait until all that belongs to the connection has ended."""
        if self.pump is not None:
            self.pump.cancel()
        for writer in self.writers:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
