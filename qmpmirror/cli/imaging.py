# SPDX-License-Identifier: MIT
"""``qmpmirror image-create``: one image of a live disk, at one instant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import Output, human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.cli.run import Interrupts


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "image-create",
        "Make one image of a disk as it is at one instant, with all of its backing chain in it,"
        " while the guest runs. Needs qemu-img, and room for a copy of the top image beside DEST.",
        "qmpmirror image-create testvm vda /export/golden.qcow2 --compress",
    )
    made.add_domain()
    made.add_disk()
    made.add_named("dest", "the path of the new image")
    made.add_limit()
    made.add_argument("--bytes", action="store_true", help="a bare --bandwidth is in bytes/s")
    made.add_argument("--format", default="qcow2", help="of the new image (default: qcow2)")
    made.add_argument("--compress", action="store_true", help="compress its clusters")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    made.read_limit(arguments)
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: _create(arguments, output, interrupts), output)


async def _create(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio

    async with await interrupts.guard(open_machine(arguments)) as vm:
        made = await interrupts.guard(
            vm.image_create(
                arguments.path,
                arguments.dest,
                format=arguments.format,
                compress=arguments.compress,
                bandwidth=arguments.bandwidth,
            ),
            takes_back=True,
        )
    output.say("Image created")
    output.note(f"{made.image} takes up {human_size(made.size)}; {made.disk} is on {made.source}")
    output.event(
        "result",
        outcome="created",
        exit=int(Exit.DONE),
        disk=made.disk,
        active=made.source,
        image=made.image,
        format=made.format,
        size=made.size,
    )
    return Exit.DONE
