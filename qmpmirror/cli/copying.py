# SPDX-License-Identifier: MIT
"""A copy on the command line, from the first command to the exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qmpmirror.cli.exits import Exit
from qmpmirror.cli.run import Interrupted, open_machine
from qmpmirror.cli.session import JobSession
from qmpmirror.cli.wording import COPY
from qmpmirror.life import Ending

if TYPE_CHECKING:
    import argparse

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.operations.options import Options
    from qmpmirror.operations.plan import Plan


async def copy_disk(
    arguments: argparse.Namespace, options: Options, output: Output, interrupts: Interrupts
) -> int:
    """``qmpmirror blockcopy`` with its parsed arguments; return the exit code."""
    ending = _ending(arguments)
    async with await interrupts.guard(open_machine(arguments)) as vm:
        plan = await interrupts.guard(vm.plan_blockcopy(arguments.path, arguments.dest, options))
        for note in plan.notes:
            output.note(f"note: {note}")
        if arguments.print_qmp:
            return _print(plan, ending, output)
        try:
            copy = await interrupts.guard(vm.start(plan), takes_back=True)
        except Interrupted:
            return COPY.aborted(output)
        output.event("started", **_start_fields(plan))
        async with JobSession(
            copy, output, interrupts, wanted=ending, verbose=arguments.verbose
        ) as session:
            await session.follow(
                wait=arguments.wait,
                seconds=arguments.timeout,
                see_end_through=not arguments.async_,
            )
        return session.code


def _print(plan: Plan, ending: Ending | None, output: Output) -> int:
    """Show the commands of a plan instead of sending them."""
    for command in [*plan.commands(), *plan.ending_commands(ending)]:
        output.say(json.dumps(command.as_qmp()))
        output.event("command", **command.as_qmp())
    output.event("result", outcome="planned", exit=int(Exit.DONE), job=str(plan.job))
    return Exit.DONE


def _ending(arguments: argparse.Namespace) -> Ending | None:
    # As with virsh, both together end gracefully on the copy.
    if arguments.pivot:
        return Ending.PIVOT
    return Ending.FINISH if arguments.finish else None


def _start_fields(plan: Plan) -> dict[str, Any]:
    return {
        "job": str(plan.job),
        "disk": plan.disk.name,
        "source": plan.disk.path,
        "destination": plan.destination.text,
        "format": plan.format,
        "shallow": plan.shallow,
        "notes": list(plan.notes),
    }
