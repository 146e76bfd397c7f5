# SPDX-License-Identifier: MIT
"""The command line, ended by SIGKILL in the middle of a cut.

usage: group_client.py first|pending|between alone|watched WORD...

``first``: when the first copy has been told to end; ``pending``: when all disks stand still;
``between``: when one of them has been finalized. ``alone``: the watchdog is killed before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from qmpmirror.cli import main
from qmpmirror.monitor import Monitor
from qmpmirror.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

moment, company, *words = sys.argv[1:]
execute = Monitor.execute
enter: Callable[[Watchdog], Coroutine[Any, Any, None]] = Watchdog.__aenter__
watchdogs: list[int] = []
seen: set[str] = set()


def die() -> NoReturn:
    if company == "alone":
        for pid in watchdogs:
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def remember(self: Watchdog) -> None:
    await enter(self)
    assert self._process is not None
    watchdogs.append(self._process.pid)


async def until_one_stands_still(monitor: Monitor) -> None:
    jobs: list[dict[str, Any]] = []
    while all(job["status"] != "pending" for job in jobs):
        jobs = await execute(monitor, "query-jobs")


async def execute_or_die(
    self: Monitor, command: str, arguments: Any = None, *, seconds: float | None = None
) -> Any:
    ends = command in {"job-complete", "block-job-cancel"}
    if (ends and moment == "first") or (command == "job-finalize" and moment == "between"):
        if command in seen:
            await asyncio.Event().wait()
        seen.add(command)
    if command == "job-finalize" and moment == "pending":
        die()
    reply = await execute(self, command, arguments, seconds=seconds)
    if seen & {command}:
        if ends:
            await until_one_stands_still(self)
        die()
    return reply


Monitor.execute = execute_or_die  # type: ignore[method-assign]
Watchdog.__aenter__ = remember  # type: ignore[method-assign]
sys.exit(main(words))
