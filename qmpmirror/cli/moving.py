# SPDX-License-Identifier: MIT
"""``qmpmirror move-storage``: a live disk with its whole chain into another folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.cli.run import Interrupts


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "move-storage",
        "Move a disk with all images of its backing chain into another folder, while the guest"
        " runs. Each keeps its name; an image that is there already and holds the same is used as"
        " it is. The old images stay. When this was interrupted, give the command again to go on,"
        " or undo it with recover --undo. Needs qemu-img.",
        "qmpmirror move-storage testvm vda /export --verbose",
    )
    made.add_domain()
    made.add_disk()
    made.add_named("dest", "the folder that the images go to; it must be there")
    made.add_limit("limit of the active image's copy in MiB/s, or with a suffix (500K, 2G)")
    made.add_argument("--bytes", action="store_true", help="a bare --bandwidth is in bytes/s")
    made.add_argument("--verbose", action="store_true", help="show the progress")
    made.add_argument(
        "--timeout", type=words.seconds, metavar="SECONDS", help="abort when it takes longer"
    )
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    made.read_limit(arguments)
    output = Output(as_json=arguments.json, label="Block Move")
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: _move(arguments, output, interrupts), output)


async def _move(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    from qmpmirror.cli.run import Interrupted, open_machine  # noqa: PLC0415 - brings asyncio
    from qmpmirror.cli.session import JobSession  # noqa: PLC0415
    from qmpmirror.cli.wording import MOVE  # noqa: PLC0415
    from qmpmirror.life import Ending  # noqa: PLC0415
    from qmpmirror.operations.move_storage import is_there  # noqa: PLC0415

    async with await interrupts.guard(open_machine(arguments)) as vm:
        # Who repeats a command because its client has died need not know how far it had come.
        if await is_there(vm.monitor, arguments.path, arguments.dest):
            output.say(f"Nothing to move: {arguments.path} is in {arguments.dest} already")
            output.event("result", outcome="done", exit=int(Exit.DONE))
            return Exit.DONE
        starting = vm.move_storage(arguments.path, arguments.dest, bandwidth=arguments.bandwidth)
        try:
            move = await interrupts.guard(starting, takes_back=True)
        except Interrupted:
            return MOVE.aborted(output)
        output.event(
            "started",
            job=move.id,
            disk=move.disk.name,
            destination=move.destination,
            backing_files=[file.path for file in move.chain],
            brought=[file.path for file in move.files],
        )
        async with JobSession(
            move, output, interrupts, wanted=Ending.PIVOT, words=MOVE, verbose=arguments.verbose
        ) as session:
            await session.follow(wait=True, seconds=arguments.timeout, see_end_through=True)
        return session.code
