# SPDX-License-Identifier: MIT
"""``qmpmirror domblklist``: virsh's table of a running QEMU's disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli.arguments import Parser
from qmpmirror.cli.render import Output, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.disks import Disk


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "domblklist", "List the disks of a running QEMU.", "qmpmirror domblklist testvm --details"
    )
    made.add_domain()
    made.add_argument("--details", action="store_true", help="add the columns Type and Device")
    made.add_argument(
        "--chain", action="store_true", help="draw the backing chains, running copies included"
    )
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    arguments = parser().parse(argv)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    output = Output(as_json=arguments.json)
    return run(lambda interrupts: interrupts.guard(_list(arguments, output)), output)


async def _list(arguments: argparse.Namespace, output: Output) -> int:
    from qmpmirror.cli.chains import draw  # noqa: PLC0415 - only here
    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio

    async with await open_machine(arguments) as vm:
        graph = await vm.graph()
        disks = await vm.disks()
    for disk in disks:
        chain = (
            [graph.location(image.name) for image in graph.chain(disk.node)] if disk.node else []
        )
        output.event("disk", **_fields(disk), chain=chain)
    output.event("result", outcome="done", exit=0)
    if arguments.details:
        rows = [(disk.storage_type, _device(disk), disk.name, _source(disk)) for disk in disks]
        output.say(table(("Type", "Device", "Target", "Source"), rows) + "\n")
    elif not arguments.chain:
        output.say(table(("Target", "Source"), [(d.name, _source(d)) for d in disks]) + "\n")
    if arguments.chain:
        output.say(draw(graph, disks) + "\n")
    return 0


def _fields(disk: Disk) -> dict[str, object]:
    return {
        "target": disk.target,
        "device": disk.device,
        "drive": disk.drive,
        "node": disk.node,
        "qom_path": disk.qom_path,
        "image_node": disk.image.name if disk.image else "",
        "format": disk.image.driver if disk.image else "",
        "source": disk.path,
        "type": disk.storage_type,
    }


def _source(disk: Disk) -> str:
    return disk.path if disk.image else "-"


def _device(disk: Disk) -> str:
    if not disk.removable:
        return "disk"
    return "floppy" if disk.target.startswith("fd") else "cdrom"
