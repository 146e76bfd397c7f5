# SPDX-License-Identifier: MIT
"""What the parsers know, as plain facts: for completion, the man page and the documentation.

Only the standard library is needed: the build of a wheel runs this without any dependency.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from qmpmirror.cli import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.cli.arguments import Parser


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        flags: such as ``("-o",)`` or ``("--format",)``.
        value: what its value is called; empty when it takes none.
        choices: the values it takes; empty when they cannot be listed.
        help: what it does.
    """

    flags: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str


class Group(NamedTuple):
    """Options under a common title."""

    title: str
    options: tuple[Option, ...]


class Command(NamedTuple):
    """A command.

    Attributes:
        name: its name.
        summary: what it does, in a few words.
        description: what it does, in some sentences.
        named: the names of the options that can be given as bare words, in this order; those that
            are not required in brackets.
        groups: its options.
        example: a whole line.
    """

    name: str
    summary: str
    description: str
    named: tuple[str, ...]
    groups: tuple[Group, ...]
    example: str

    @property
    def options(self) -> tuple[Option, ...]:
        """All its options."""
        return tuple(option for group in self.groups for option in group.options)


def commands() -> list[Command]:
    """All commands, in the order of ``qmpmirror --help``."""
    return [_command(name) for name in COMMANDS]


def _command(name: str) -> Command:
    module, summary = COMMANDS[name]
    parser: Parser = import_module(f"qmpmirror.cli.{module}").parser()
    named = parser.add_named_options()
    return Command(
        name=name,
        summary=summary,
        description=" ".join((parser.description or "").split()),
        named=tuple(word if needed else f"[{word}]" for word, needed in named),
        groups=tuple(group for group in _groups(parser) if group.options),
        example=(parser.epilog or "").removeprefix("example:").strip(),
    )


def _groups(parser: argparse.ArgumentParser) -> Iterator[Group]:
    for group in parser._action_groups:  # noqa: SLF001 - argparse has no other way to ask
        shown = [
            action
            for action in group._group_actions  # noqa: SLF001 - as above
            if action.option_strings and action.help is not argparse.SUPPRESS
        ]
        yield Group(group.title or "", tuple(map(_option, shown)))


def _option(action: argparse.Action) -> Option:
    choices = tuple(map(str, action.choices or ()))
    value = ""
    if action.nargs != 0:
        name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = "|".join(choices) if choices else name
    text = " ".join((action.help or "").split()).replace("%%", "%")
    return Option(tuple(action.option_strings), value, choices, text)
