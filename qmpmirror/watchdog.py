# SPDX-License-Identifier: MIT
"""A process that lets the guest's disks go on when its parent dies in the middle of a cut.

A pending job keeps its disk frozen until somebody finalizes or cancels it, and QEMU does not care
whether that somebody still lives. The watchdog waits on a pipe; when the pipe closes without a
word, it connects in the parent's place and releases the group.
"""

from __future__ import annotations

import asyncio
import contextlib
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
        from qmpmirror import errors  # noqa: PLC0415 - the watchdog itself starts without

        if not self.address:
            return
        # With the parent's own path: -m would look into the working directory first.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, self.address, self.group),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # when it has something to say, nobody listens
                start_new_session=True,  # a Ctrl-C is meant for the parent
            )
        except OSError as error:
            raise errors.Refused(f"the watchdog cannot be started: {error}") from None
        if self._process.stdout is None:
            return
        try:
            # Only when it runs is there somebody to watch.
            await self._process.stdout.readline()
        except BaseException:
            await self._end(_DONE)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from qmpmirror import errors  # noqa: PLC0415 - the watchdog itself starts without

        await self._end(b"" if isinstance(exc, errors.ConnectionLost) else _DONE)

    async def _end(self, word: bytes) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(ConnectionError):  # somebody may have killed it
            self._process.stdin.write(word)
            self._process.stdin.close()
            await self._process.stdin.wait_closed()
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
