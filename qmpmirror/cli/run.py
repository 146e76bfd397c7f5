# SPDX-License-Identifier: MIT
"""How a command runs: one event loop, Ctrl-C, and errors turned into exit codes."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qmpmirror import errors
from qmpmirror.cli.exits import Exit, exit_code

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Coroutine

    from qmpmirror.cli.render import Output
    from qmpmirror.machine import Machine

T = TypeVar("T")

_PATIENCE: Final = 2.0
"""Seconds after which somebody wants to know what is being waited for."""


class Interrupted(Exception):
    """Ctrl-C (or SIGTERM) came while something was under way."""


class Interrupts:
    """Turns signals into the end of whatever is being waited for, one at a time."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._pending = False
        self._takes_back = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)

    async def guard(self, work: Coroutine[Any, Any, T], *, takes_back: bool = False) -> T:
        """Wait for ``work``; a signal cancels it.

        Args:
            work: what is to be done.
            takes_back: whether ``work`` takes back what it has done when it is cancelled: then a
                second signal does not cut that short.

        Raises:
            Interrupted: a signal came. ``work`` has been cancelled and has cleaned up.
        """
        task: asyncio.Task[T] = asyncio.create_task(work)
        self._task = task
        self._takes_back = takes_back
        if self._pending:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if not self._pending:
                raise
            self._pending = False
            raise Interrupted from None
        finally:
            self._task = None

    def _interrupt(self) -> None:
        repeated, self._pending = self._pending, True
        if self._task is not None and not (repeated and self._takes_back):
            self._task.cancel()


async def open_machine(arguments: argparse.Namespace) -> Machine:
    """Connect as a command's common arguments say."""
    from qmpmirror.machine import connect  # noqa: PLC0415 - brings qemu.qmp

    def tell() -> None:
        print(f"waiting for the monitor of {arguments.domain}: is it taken?", file=sys.stderr)

    waiting = asyncio.get_running_loop().call_later(_PATIENCE, tell)
    try:
        return await connect(
            arguments.domain, timeout=arguments.connect_timeout, transcript=arguments.transcript
        )
    finally:
        waiting.cancel()


def run(command: Callable[[Interrupts], Coroutine[Any, Any, int]], output: Output) -> int:
    """Run a command to its exit code; errors are shown, never a traceback."""

    async def guarded() -> int:
        return await command(Interrupts())

    # qemu.qmp logs what it raises as well, and without any handler that would go to stderr.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    try:
        return asyncio.run(guarded())
    except (Interrupted, KeyboardInterrupt):  # the latter before or after the loop takes signals
        output.error("interrupted")
        output.event("result", outcome="interrupted", exit=int(Exit.FAILED))
        return Exit.FAILED
    except errors.Error as error:
        code = exit_code(error)
        report(error, code, output)
        return code


def report(error: errors.Error, code: Exit, output: Output) -> None:
    """Show an error to a person, or as the result to a program."""
    output.error(str(error))
    output.left(error.left)
    output.event(
        "result",
        outcome="error",
        exit=int(code),
        error=type(error).__name__,
        message=error.description,
        hint=error.hint,
        left=list(error.left),
    )
