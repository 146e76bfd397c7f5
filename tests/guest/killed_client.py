# SPDX-License-Identifier: MIT
"""The command line, ended by SIGKILL at one QMP command: before it is sent, or after its reply.

usage: killed_client.py NUMBER before|after LOG WORD...

LOG gets the name of each command, before it is sent.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from qmpmirror.cli import main
from qmpmirror.monitor import Monitor

number, moment, log, *words = sys.argv[1:]
record = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
execute = Monitor.execute
sent = 0


async def execute_or_die(
    self: Monitor, command: str, arguments: Any = None, *, seconds: float | None = None
) -> Any:
    global sent  # noqa: PLW0603 - the count of a whole process
    mine = sent
    sent += 1
    os.write(record, f"{command}\n".encode())
    if mine == int(number) and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    reply = await execute(self, command, arguments, seconds=seconds)
    if mine == int(number) and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return reply


Monitor.execute = execute_or_die  # type: ignore[method-assign]
sys.exit(main(words))
