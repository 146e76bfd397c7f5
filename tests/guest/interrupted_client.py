# SPDX-License-Identifier: MIT
"""The command line, interrupted at one QMP command: before it is sent, or after its reply.

usage: interrupted_client.py NUMBER kill|cut before|after LOG WORD...

``kill`` ends the process by SIGKILL, ``cut`` its connection to QEMU.

LOG gets the name of each command, before it is sent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

from qmpmirror.cli import main
from qmpmirror.monitor import Monitor

number, how, moment, log, *words = sys.argv[1:]
record = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
execute = Monitor.execute
sent = 0


def interrupt(monitor: Monitor) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    writer = monitor.client._writer
    assert writer is not None
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


async def execute_or_not(
    self: Monitor, command: str, arguments: Any = None, *, seconds: float | None = None
) -> Any:
    global sent  # noqa: PLW0603 - the count of a whole process
    mine = sent
    sent += 1
    os.write(record, f"{command}\n".encode())
    if mine == int(number) and moment == "before":
        interrupt(self)
    try:
        return await execute(self, command, arguments, seconds=seconds)
    finally:  # a refusal is a reply too
        if mine == int(number) and moment == "after":
            interrupt(self)


Monitor.execute = execute_or_not  # type: ignore[method-assign]
sys.exit(main(words))
