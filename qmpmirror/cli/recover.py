# SPDX-License-Identifier: MIT
"""``qmpmirror recover``: what an interrupted run has left, finished or undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.machine import Machine


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "recover",
        "Finish or undo what interrupted runs have left in QEMU. A pivot or an abort that had begun"
        " is seen through. A copy that still runs, or follows the guest in the mirroring phase, is"
        " left running, since its client may be alive: --finish ends it as its command would have,"
        " --undo takes it back.",
        "qmpmirror recover testvm --finish",
    )
    made.add_domain()
    ways = made.add_mutually_exclusive_group()
    ways.add_argument(
        "--finish",
        action="store_true",
        help="end running copies as they were meant to end: pivot or finish",
    )
    ways.add_argument("--undo", action="store_true", help="abort running copies")
    made.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    arguments = parser().parse(argv)
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: interrupts.guard(_recover(arguments, output)), output)


async def _recover(arguments: argparse.Namespace, output: Output) -> int:
    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio
    from qmpmirror.operations.findings import Way  # noqa: PLC0415 - brings qemu.qmp

    way = Way.FINISH if arguments.finish else Way.UNDO if arguments.undo else Way.LEAVE
    async with await open_machine(arguments) as vm:
        findings = await vm.recover(way, dry_run=arguments.dry_run)
        disks = await vm.disks() if await _has_guest(vm) else []
    if not findings:
        output.say("Nothing to recover")
    for found in findings:
        what = f"{found.what} of {found.disk}" if found.disk else found.what
        where = f" to {found.destination}" if found.destination else ""
        output.say(f"{what}{where}, {found.state.value}: {found.action}")
        output.left(found.left)
        output.event(
            "finding",
            run=found.run,
            what=found.what,
            state=found.state.value,
            disk=found.disk,
            destination=found.destination,
            action=found.action,
            left=list(found.left),
        )
    if any(found.action == "left running" for found in findings):
        output.note("--finish ends what is left running as it was meant to end, --undo aborts it")
    for disk in disks:
        if disk.image is not None and disk.qom_path:
            output.say(f"{disk.name}: the guest runs on {disk.path}")
    code = Exit.NOT_CLEAN if any(found.left for found in findings) else Exit.DONE
    active = {disk.name: disk.path for disk in disks if disk.image is not None}
    output.event("result", outcome="done", exit=int(code), active=active)
    return code


async def _has_guest(vm: Machine) -> bool:
    """Whether its disks are in use here: the guest may have moved away, or is still to come."""
    if not (await vm.schema()).has_command("query-status"):
        return True
    status = await vm.monitor.execute("query-status")
    return status["status"] not in {"inmigrate", "postmigrate"}
