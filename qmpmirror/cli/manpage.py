# SPDX-License-Identifier: MIT
"""The man page, from the parsers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qmpmirror import __version__
from qmpmirror.cli.manual import commands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.cli.manual import Command, Option

DOMAINS: Final = (
    ("/vm/qmp.sock, unix:/vm/qmp.sock", "a QMP socket"),
    ("localhost:4444, tcp:localhost:4444", "a QMP port"),
    ("testvm", "what -name gave a QEMU that runs here"),
    ("24476", "its pid"),
)
"""Ways to say which QEMU."""

DISKS: Final = (
    ("vda, sda, hda", "libvirt's target: the bus, and the order of the disks on it"),
    ("disk0", "the id of a -device, of a -drive, or a node name"),
    ("/machine/peripheral/disk0/virtio-backend", "a QOM path"),
    ("/vm/snap2.qcow2", "the path of the active image"),
)
"""Ways to say which disk."""

EXITS: Final = (
    ("0", "done as asked"),
    ("1", "the copy failed or was aborted"),
    ("2", "usage"),
    (
        "3",
        "no connection: no such QEMU or socket, no QMP, or another client holds the monitor",
    ),
    ("4", "QEMU refused, or lacks what was asked; nothing changed"),
    ("5", "a deadline passed"),
    (
        "6",
        "the connection was lost while a job ran; the message says where the guest's data is",
    ),
    ("7", "done, but something could not be cleaned up; the message names it"),
)
"""What the exit codes mean."""

_INTRODUCTION: Final = (
    "qmpmirror copies a disk under the live guest over QMP, and then switches the guest to the copy"
    " (pivot) or leaves the guest where it is and keeps a consistent copy (finish). The words on"
    " the command line are those of virsh. A copy outlives the command that has started it: any"
    " command can be killed at any point, and blockjob or recover picks the copy up from QEMU."
)


def manpage() -> str:
    """The page, in the man macros of troff."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield f'.TH QMPMIRROR 1 "" "qmpmirror {__version__}" "User Commands"'
    yield ".SH NAME"
    yield "qmpmirror \\- virsh blockcopy for the QEMU processes that libvirt does not manage"
    yield ".SH SYNOPSIS"
    yield ".B qmpmirror"
    yield ".I COMMAND DOMAIN"
    yield ".RI [ OPTION .\\|.\\|.]"
    yield ".SH DESCRIPTION"
    yield _text(_INTRODUCTION)
    yield ".SH COMMANDS"
    for command in commands():
        yield from _command(command)
    for title, rows in (("DOMAIN", DOMAINS), ("DISK", DISKS), ("EXIT STATUS", EXITS)):
        yield f".SH {title}"
        for term, meaning in rows:
            yield from _item(_bold(term), meaning)
    yield ".SH SEE ALSO"
    yield ".BR virsh (1),"
    yield ".BR qemu (1),"
    yield ".BR qemu\\-img (1)"


def _command(command: Command) -> Iterator[str]:
    words = " ".join(word.upper() for word in command.named)
    yield f".SS {_text(f'{command.name} {words}'.strip())}"
    yield _text(command.description)
    for group in command.groups:
        if group.title != "options":
            yield ".PP"
            yield _text(f"{group.title[0].upper()}{group.title[1:]}:")
        for option in group.options:
            yield from _item(_flags(option), option.help)
    yield ".PP"
    yield "Example:"
    yield ".PP"
    yield ".nf"
    yield ".RS 4"
    yield _text(command.example)
    yield ".RE"
    yield ".fi"


def _flags(option: Option) -> str:
    flags = ", ".join(map(_bold, option.flags))
    return f"{flags} \\fI{_text(option.value)}\\fR" if option.value else flags


def _item(term: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield term
    yield _text(text)


def _bold(text: str) -> str:
    return f"\\fB{_text(text)}\\fR"


def _text(text: str) -> str:
    """Plain text; a dot or an apostrophe at the beginning would be a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in {".", "'"} else escaped
