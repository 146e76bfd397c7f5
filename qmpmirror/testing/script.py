# SPDX-License-Identifier: MIT
"""What a fake QMP server is told to do: replies, faults and events."""

from __future__ import annotations

import gzip
import json
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

Message: TypeAlias = dict[str, Any]


class FakeError(Exception):
    """Raised or given as a reply: QEMU refuses the command.

    Attributes:
        description: QEMU's words.
        error_class: QEMU's error class.
    """

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        self.description = description
        self.error_class = error_class
        super().__init__(description)


Script: TypeAlias = "FakeError | Callable[[dict[str, Any]], Any | Awaitable[Any]] | Any"
"""A reply: a value, an error, or a function of the arguments that returns or raises one."""


@attrs.frozen
class Received:
    """A command that a client has sent."""

    name: str
    arguments: dict[str, Any]


@attrs.define
class Fault:
    """What goes wrong with the reply to a command; the command itself is executed.

    Attributes:
        delay: Seconds until the reply is sent; what follows waits behind it.
        drop: Whether it is never sent.
        duplicate: Whether it is sent twice.
        corrupt: Whether it is sent without its last brace, so that it is no JSON.
        half: Whether the connection is closed in the middle of it.
        close: Whether the connection is closed after it.
        once: Whether only the next such command is meant.
    """

    delay: float = 0.0
    drop: bool = False
    duplicate: bool = False
    corrupt: bool = False
    half: bool = False
    close: bool = False
    once: bool = False


def event(name: str, data: dict[str, Any] | None = None, /, **keywords: Any) -> Message:
    """An event as QEMU sends it. Underscores in keywords become dashes."""
    now = time.time()
    seconds = int(now)
    return {
        "timestamp": {"seconds": seconds, "microseconds": int((now - seconds) * 1_000_000)},
        "event": name,
        "data": {**(data or {}), **{key.replace("_", "-"): v for key, v in keywords.items()}},
    }


def load_schema(path: Path) -> list[Message]:
    """A recorded reply to ``query-qmp-schema``, from a JSON file that may be gzipped."""
    content = path.read_bytes()
    found = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    schema: list[Message] = found["return"] if isinstance(found, dict) else found
    return schema
