# SPDX-License-Identifier: MIT
"""``qmpmirror domblkinfo``: virsh's sizes of a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli.arguments import Parser
from qmpmirror.cli.render import Output, human_size, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.disks import Disk
    from qmpmirror.stats import Sizes


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "domblkinfo",
        "Show the sizes of a disk: capacity is what the guest sees, allocation up to where its"
        " image is written, physical what the image takes up.",
        "qmpmirror domblkinfo testvm vda --human",
    )
    made.add_domain()
    made.add_named("device", "the disk: target (vda), device id, node name, path", required=False)
    made.add_argument("--all", action="store_true", help="all disks, as a table")
    made.add_argument("--human", action="store_true", help="sizes with units")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    if arguments.all is (arguments.device is not None):
        made.error("give either a disk or --all")
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: interrupts.guard(_info(arguments, output)), output)


async def _info(arguments: argparse.Namespace, output: Output) -> int:
    import attrs  # noqa: PLC0415 - as late as everything else here

    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio

    async with await open_machine(arguments) as vm:
        chosen = [await vm.disk(arguments.device)] if arguments.device else await vm.disks()
        found = [(disk, await vm.sizes(disk)) for disk in chosen]
    for disk, sizes in found:
        numbers = attrs.asdict(sizes)
        output.event("disk", name=disk.name, **(numbers if disk.image else dict.fromkeys(numbers)))
    output.event("result", outcome="done", exit=0)
    if arguments.all:
        header = ("Target", "Capacity", "Allocation", "Physical")
        rows = [(disk.name, *_cells(disk, sizes, arguments)) for disk, sizes in found]
        output.say(table(header, rows) + "\n")
    else:
        ((disk, sizes),) = found
        labels = ("Capacity:", "Allocation:", "Physical:")
        lines = zip(labels, _cells(disk, sizes, arguments), strict=True)
        output.say("\n".join(f"{label:<15} {cell}" for label, cell in lines) + "\n")
    return 0


def _cells(disk: Disk, sizes: Sizes, arguments: argparse.Namespace) -> list[str]:
    if disk.image is None:
        return ["-", "-", "-"]
    numbers = (sizes.capacity, sizes.allocation, sizes.physical)
    return [human_size(number) if arguments.human else str(number) for number in numbers]
