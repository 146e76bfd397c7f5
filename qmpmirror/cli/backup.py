# SPDX-License-Identifier: MIT
"""``qmpmirror backup``: a consistent copy of one disk or several; ``blockcopy --finish``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import blockcopy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.cli.arguments import Parser


def parser() -> Parser:
    """The command's parser."""
    made = blockcopy.parser(
        "backup",
        "Copy a disk under the live guest, or several at one point in time, and end with consistent"
        " copies; the guest stays where it is. With --shallow only the top image is copied.",
        "qmpmirror backup testvm --all-disks --dest-dir /backup",
    )
    made.hide("--pivot", "--finish", "--wait", "--async", "--keep-source")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return blockcopy.run_parsed(parser(), [*argv, "--finish"])
