# SPDX-License-Identifier: MIT
"""``qmpmirror blockcommit``: virsh's command, flag by flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

_FLAGS = {
    "--shallow": "commit into the image right below the top",
    "--active": "commit the active image too, in two phases",
    "--delete": "remove the files of the committed images when all is done",
    "--pivot": "commit the active image, then switch the guest to the base; implies --wait",
    "--keep-overlay": "commit the active image, then go on with it as an overlay; implies --wait",
    "--keep-relative": "name the backing file relative to the image above it",
}


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "blockcommit",
        "Write images of a disk's backing chain into one below them, which makes the chain"
        " shorter. The active image is committed while the guest writes to it.",
        "qmpmirror blockcommit testvm vda --active --shallow --wait --verbose --pivot",
    )
    made.add_domain()
    made.add_disk()
    made.add_limit()
    made.add_argument("--base", metavar="IMAGE", help="where to commit to (default: the lowest)")
    made.add_argument("--top", metavar="IMAGE", help="where to begin (default: the active image)")
    for flag, text in _FLAGS.items():
        made.add_argument(flag, action="store_true", help=text)
    words.add_waiting(made, "the commit, or its synchronized phase,")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    if arguments.pivot and arguments.keep_overlay:
        made.error("--pivot and --keep-overlay are mutually exclusive")
    arguments.active |= arguments.pivot or arguments.keep_overlay
    arguments.wait |= arguments.pivot or arguments.keep_overlay
    words.check_waiting(made, arguments)
    output = Output(as_json=arguments.json, label="Block commit")
    from qmpmirror.cli.chaining import commit  # noqa: PLC0415 - brings asyncio and qemu.qmp
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: commit(arguments, output, interrupts), output)
