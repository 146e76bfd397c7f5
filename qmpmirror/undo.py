# SPDX-License-Identifier: MIT
"""What takes a half-done start back, the last thing first."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qmpmirror.monitor import Monitor
    from qmpmirror.steps import Command

log = logging.getLogger("qmpmirror.undo")

_STILL_THERE: Final = ("in use", "is busy")


@attrs.define
class Undo:
    """Collects what must be done to take a start back.

    An entry is added before what it takes back is sent, because a command whose reply never came
    may have run; so there may be nothing to take back, and that is fine.
    """

    _entries: list[tuple[str, Callable[[], Awaitable[object]]]] = attrs.field(factory=list)

    def add(self, what: str, act: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Add an entry.

        Args:
            what: it, for a person who has to do it by hand.
            act: does it.
            arguments: of ``act``.
        """
        self._entries.append((what, lambda: act(*arguments)))

    def command(self, monitor: Monitor, command: Command) -> None:
        """Add a QMP command."""
        what = " ".join([command.name, *map(str, command.arguments.values())])
        self.add(what, _send, monitor, command)

    async def run(self) -> tuple[str, ...]:
        """Take everything back.

        Returns:
            What could not be taken back. When QEMU does not answer, the rest is not even tried: a
            file must not be removed that QEMU may be writing to.
        """
        left = []
        while self._entries:
            what, act = self._entries.pop()
            try:
                await act()
            except (errors.ConnectionLost, errors.DeadlineExceeded) as error:
                log.warning("%s: %s", what, error)
                left += [what, *(what for what, _ in reversed(self._entries))]
                break
            except (errors.Error, OSError) as error:
                left.append(f"{what}: {error}")
        return tuple(left)


async def _send(monitor: Monitor, command: Command) -> None:
    try:
        await monitor.execute(command.name, command.arguments)
    except errors.CommandFailed as error:
        if any(words in error.reason for words in _STILL_THERE):
            raise
        log.debug("%s: nothing to undo: %s", command.name, error.reason)
