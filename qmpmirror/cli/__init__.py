# SPDX-License-Identifier: MIT
"""The command line: ``qmpmirror COMMAND DOMAIN ...`` where virsh says ``virsh COMMAND DOMAIN ...``.

No module of this folder imports asyncio or qemu.qmp before a command really runs: help, version and
completion need neither.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

from qmpmirror import __version__
from qmpmirror.cli.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "blockcopy": ("blockcopy", "copy a disk under the live guest; pivot to the copy or keep it"),
    "blockjob": ("blockjob", "see, steer and end the block job of a disk"),
    "blockcommit": ("blockcommit", "write images of a chain into one below them"),
    "blockpull": ("blockpull", "read what lies below the active image into it"),
    "backup": ("backup", "make consistent copies of one disk, or of several at one instant"),
    "image-create": ("imaging", "make one image of a live disk, its whole chain in it"),
    "move-storage": ("moving", "move a live disk with its whole chain into another folder"),
    "migrate": ("migrate", "move a guest and its storage to a second QEMU"),
    "snapshot-create-as": ("snapshot", "put an overlay over the disks, all at one instant"),
    "recover": ("recover", "finish or undo what an interrupted run has left"),
    "doctor": ("doctor", "show on one page what a bug report needs, and what looks wrong"),
    "list": ("list", "list the running QEMUs that have a QMP socket"),
    "domblklist": ("domblklist", "list the disks of a running QEMU"),
    "domblkinfo": ("domblkinfo", "show the sizes of a disk"),
    "domblkstat": ("domblkstat", "show what the guest has read and written"),
    "completion": ("completion", "print completion for bash, zsh or fish, or the man page"),
}
"""Command → module of this folder, and what it does in a few words."""

_USAGE: Final = """\
usage: qmpmirror [--version] [--help] COMMAND ...

virsh blockcopy for the QEMU processes that libvirt does not manage.

commands:
{commands}

`qmpmirror COMMAND --help` tells more, with an example.
DOMAIN is a QMP socket, HOST:PORT, or the -name or pid of a QEMU that runs here. It has a
socket when it was started with -qmp unix:PATH,server=on,wait=off; each serves one client at a time.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = [*(sys.argv[1:] if argv is None else argv)]  # "list" is a command of ours
    if words[:1] == ["--version"]:
        print(f"qmpmirror {__version__}")
        return Exit.DONE
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_usage(), end="", file=sys.stdout if words else sys.stderr)
        return Exit.DONE if words else Exit.USAGE
    command, *rest = words
    if command not in COMMANDS:
        print(f"error: {_unknown(command)}", file=sys.stderr)
        return Exit.USAGE
    module = import_module(f"{__name__}.{COMMANDS[command][0]}")
    code: int = module.main(rest)
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return _USAGE.format(commands="\n".join(lines))


def _unknown(command: str) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only for a mistake

    close = get_close_matches(command, COMMANDS, n=1)
    advice = f"did you mean {close[0]}?" if close else "see qmpmirror --help"
    return f"unknown command {command!r}: {advice}"
