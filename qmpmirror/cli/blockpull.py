# SPDX-License-Identifier: MIT
"""``qmpmirror blockpull``: virsh's command, flag by flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "blockpull",
        "Read what lies below a disk's active image into it, which makes the chain shorter."
        " Without --base the disk needs no backing file any more.",
        "qmpmirror blockpull testvm vda --base /images/base.qcow2 --wait --verbose",
    )
    made.add_domain()
    made.add_disk()
    made.add_limit()
    made.add_argument("--base", metavar="IMAGE", help="the image that stays below")
    made.add_argument(
        "--keep-relative",
        action="store_true",
        help="name the base relative to the active image; needs --base",
    )
    words.add_waiting(made, "the pull")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    words.check_waiting(made, arguments)
    if arguments.keep_relative and not arguments.base:
        made.error("--keep-relative needs --base")
    output = Output(as_json=arguments.json, label="Block Pull")
    from qmpmirror.cli.chaining import pull  # noqa: PLC0415 - brings asyncio and qemu.qmp
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: pull(arguments, output, interrupts), output)
