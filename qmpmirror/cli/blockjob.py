# SPDX-License-Identifier: MIT
"""``qmpmirror blockjob``: see, steer and end the block job of a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

_MODES = {
    "--info": "show progress and limit (the default)",
    "--abort": "end it; a copy in the mirroring phase is brought to one instant first",
    "--pivot": "switch the guest to the copy",
    "--watch": "show progress until the job has ended",
    "--pause": "pause it",
    "--resume": "let it go on, also after an I/O error that stopped it",
    "--synchronous-writes": "guest writes wait for both images from now on (QEMU 8.2)",
}


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "blockjob",
        "See, steer and end the block job of a disk, whoever has started it.",
        "qmpmirror blockjob testvm vda --pivot",
    )
    made.add_named("domain", "the QEMU: QMP socket, HOST:PORT, name or pid")
    made.add_named("path", "the disk: target (vda), device or drive id, node name, image path")
    modes = made.add_mutually_exclusive_group()
    for flag, text in _MODES.items():
        modes.add_argument(flag, action="store_true", help=text)
    modes.add_argument("--bandwidth", metavar="LIMIT", help="in MiB/s, or with a suffix; 0: none")
    made.add_argument("--raw", action="store_true", help="info as fixed KEY=VALUE lines")
    made.add_argument("--bytes", action="store_true", help="bandwidth in bytes/s, both ways")
    made.add_argument(
        "--async", dest="async_", action="store_true", help="abort or pivot without waiting"
    )
    made.add_argument(
        "--force", action="store_true", help="abort at once; the copy is worthless then"
    )
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    if arguments.async_ and not arguments.pivot:
        arguments.abort = True  # as with virsh
    if arguments.force:
        if arguments.pivot:
            made.error("--force goes with --abort only")
        arguments.abort = True
    ending = arguments.abort or arguments.pivot
    if arguments.raw and (ending or arguments.bandwidth or arguments.watch):
        made.error("--raw goes with --info only")
    if arguments.bandwidth is not None:
        try:
            arguments.bandwidth = words.bandwidth(arguments.bandwidth, in_bytes=arguments.bytes)
        except ValueError as error:
            made.error(str(error))
    output = Output(as_json=arguments.json, label="Block Copy")
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio
    from qmpmirror.cli.steering import steer  # noqa: PLC0415 - brings asyncio and qemu.qmp

    return run(lambda interrupts: steer(arguments, output, interrupts), output)
