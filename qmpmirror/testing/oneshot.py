# SPDX-License-Identifier: MIT
"""One QMP command over one blocking connection: for the harness, never for the code under test."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import BufferedRWPair
    from pathlib import Path


class CommandError(Exception):
    """QEMU refused a command of the harness.

    Attributes:
        command: Name of the command.
        error_class: QEMU's error class, such as ``GenericError`` or ``CommandNotFound``.
        description: QEMU's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        self.command = command
        self.error_class = error_class
        self.description = description
        super().__init__(f"{command}: {description} ({error_class})")


def execute(path: str | Path, command: str, arguments: Mapping[str, Any], *, timeout: float) -> Any:
    """Connect, negotiate, execute one command and disconnect.

    A connection per command keeps no events waiting in QEMU for a harness that does not read them.

    Args:
        path: The QMP socket.
        command: Name of the command.
        arguments: Its arguments, as QEMU spells them.
        timeout: Seconds for each step of the conversation.

    Returns:
        What QEMU returned.

    Raises:
        CommandError: QEMU refused.
        ConnectionError: Nobody listens, or QEMU hung up (it may have crashed).
        TimeoutError: No answer in time.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            _receive(stream)
            _ask(stream, "qmp_capabilities", {})
            return _ask(stream, command, arguments)


def _ask(stream: BufferedRWPair, command: str, arguments: Mapping[str, Any]) -> Any:
    request = {"execute": command, "arguments": arguments, "id": command}
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    while True:
        message = _receive(stream)
        if message.get("id") == command:
            break
    if "error" in message:
        raise CommandError(command, message["error"]["class"], message["error"]["desc"])
    return message["return"]


def _receive(stream: BufferedRWPair) -> dict[str, Any]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("QEMU closed the QMP connection")
    message: dict[str, Any] = json.loads(line)
    return message
