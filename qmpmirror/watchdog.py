# SPDX-License-Identifier: MIT
"""A process that lets the guest's disks go on when its parent dies in the middle of a cut.

A pending job keeps its disk frozen until somebody finalizes or cancels it, and QEMU does not care
whether that somebody still lives. The watchdog waits on a pipe; when the pipe closes without a
word, it connects in the parent's place and releases the group.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from types import TracebackType

_DONE: Final = b"done\n"
_STARTED: Final = b"started\n"
_SECONDS: Final = 30.0


@attrs.define
class Watchdog:
    """Runs the process while an ``async with`` block lasts.

    Attributes:
        address: where it can connect, once the parent's connection is gone; when that is not
            known, because the connection is somebody else's, there is no watchdog.
        group: the group that it watches over.
    """

    address: str
    group: str
    _process: asyncio.subprocess.Process | None = attrs.field(default=None, init=False)

    async def __aenter__(self) -> None:
        if not self.address:
            return
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmpmirror.watchdog", self.address, self.group),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is meant for the parent
        )
        # Only when it runs is there somebody to watch.
        if self._process.stdout is not None:
            await self._process.stdout.readline()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from qmpmirror import errors  # noqa: PLC0415 - the watchdog itself starts without

        if self._process is None or self._process.stdin is None:
            return
        if not isinstance(exc, errors.ConnectionLost):
            self._process.stdin.write(_DONE)
        self._process.stdin.close()
        await self._process.wait()


def main() -> None:
    """Be the watchdog: wait for the word on standard input, or for its end."""
    address, group = sys.argv[1:]
    sys.stdout.buffer.write(_STARTED)
    sys.stdout.buffer.flush()
    if sys.stdin.buffer.read() != _DONE:
        asyncio.run(_release(address, group))


async def _release(address: str, group: str) -> None:
    from qmpmirror.machine import connect  # noqa: PLC0415 - only now
    from qmpmirror.operations.release import release_group  # noqa: PLC0415 - only now

    async with connect(address, timeout=_SECONDS) as vm:
        await release_group(vm.monitor, group)


if __name__ == "__main__":
    main()
