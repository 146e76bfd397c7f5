# SPDX-License-Identifier: MIT
"""``qmpmirror list``: the QEMUs of this host that can be talked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli.arguments import Parser
from qmpmirror.cli.render import Output, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.discover import Endpoint, Process


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "list",
        "List the running QEMUs of this host that have a QMP socket. State is asked for where the"
        " monitor is free; a monitor serves one client at a time.",
        "qmpmirror list",
    )
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    arguments = parser().parse(argv)
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: interrupts.guard(_list(arguments, output)), output)


async def _list(arguments: argparse.Namespace, output: Output) -> int:
    import asyncio  # noqa: PLC0415 - loaded by now

    from qmpmirror import discover  # noqa: PLC0415 - only here

    found = [process for process in discover.processes() if process.endpoints]
    free = {
        process: [end for end in process.endpoints if not discover.is_taken(end)]
        for process in found
    }
    states = await asyncio.gather(
        *(_state(process, free[process], arguments.connect_timeout) for process in found)
    )
    rows = []
    for process, state in zip(found, states, strict=True):
        for endpoint in process.endpoints:
            is_free = endpoint in free[process]
            monitor = "free" if is_free else "taken"
            rows.append((str(process.pid), process.name or "-", state, str(endpoint), monitor))
            output.event(
                "qemu",
                pid=process.pid,
                name=process.name,
                state=state,
                socket=str(endpoint),
                free=is_free,
            )
    output.say(table(("Pid", "Name", "State", "Socket", "Monitor"), rows) + "\n")
    output.event("result", outcome="done", exit=0)
    return 0


async def _state(process: Process, free: Sequence[Endpoint], seconds: float) -> str:
    """QEMU's own word for its state; ``-`` when nobody can ask or answer."""
    from qmpmirror import errors  # noqa: PLC0415 - loaded by now
    from qmpmirror.address import Domain  # noqa: PLC0415 - as above
    from qmpmirror.connection import open_monitor  # noqa: PLC0415 - brings qemu.qmp

    if not free:
        return "-"
    domain = Domain(str(process.pid), tuple(free), process.pid)
    try:
        monitor = await open_monitor(domain, seconds=min(seconds, 2.0))
    except errors.ConnectError:
        return "-"
    try:
        status = await monitor.execute("query-status")
        return str(status["status"])
    except errors.CommandFailed:
        return "no guest"  # a storage daemon
    except errors.Error:
        return "-"
    finally:
        await monitor.close()
