# SPDX-License-Identifier: MIT
"""Arguments as virsh takes them: every positional has an option of the same name."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qmpmirror.cli.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH: Final = 79
_MIB: Final = 1024 * 1024
_SUFFIXES: Final = "kmgtpe"
_SIZE: Final = re.compile(rf"(-?\d+)\s*(?:([{_SUFFIXES}])(ib|b)?|(b))?", re.IGNORECASE)
_MAX_INT64: Final = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that fills virsh's named positionals in order.

    Words without an option go to the named positionals that no option has set yet.
    """

    def __init__(self, command: str, summary: str, example: str) -> None:
        super().__init__(
            prog=f"qmpmirror {command}",
            description=textwrap.fill(summary, _WIDTH),
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._named: list[tuple[str, str, bool]] = []
        self._as_json = False

    def add_named(self, name: str, help: str, *, required: bool = True) -> None:  # noqa: A002
        """Add a positional that can be given as ``--NAME`` too."""
        self._named.append((name, help, required))

    def add_domain(self) -> None:
        """Add the QEMU that is meant."""
        self.add_named("domain", "the QEMU: QMP socket, HOST:PORT, name or pid")

    def add_disk(self, *, required: bool = True) -> None:
        """Add the disk that is meant, under virsh's name for it."""
        text = "the disk: target (vda), device or drive id, node name, image path"
        self.add_named("path", text, required=required)

    def add_limit(self, text: str = "limit in MiB/s, or with a suffix (500K, 2G)") -> None:
        """Add the bandwidth."""
        self.add_named("bandwidth", text, required=False)

    def read_limit(self, parsed: argparse.Namespace) -> None:
        """Make bytes/s of the bandwidth, 0 when none was given."""
        try:
            parsed.bandwidth = bandwidth(parsed.bandwidth or "0", in_bytes=parsed.bytes)
        except ValueError as error:
            self.error(str(error))

    def hide(self, *options: str) -> None:
        """Leave options out of the help: they are understood, and of no use here."""
        for action in self._actions:
            if action.option_strings and action.option_strings[0] in options:
                action.help = argparse.SUPPRESS

    def add_common(self) -> None:
        """Add what every command understands."""
        self.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
        self.add_argument(
            "--transcript", metavar="FILE", help="write everything that passes over QMP to FILE"
        )
        self.add_argument(
            "--connect-timeout",
            type=_seconds,
            default=10.0,
            metavar="SECONDS",
            help="how long to wait for the monitor's greeting (default: 10)",
        )

    def add_named_options(self) -> list[tuple[str, bool]]:
        """Make options of the named positionals, once all else is there; their names, in order.

        Returns:
            For each its name, and whether it is required.
        """
        for name, text, _ in self._named:
            self.add_argument(f"--{name}", metavar=name.upper(), help=text)
        if self._named:
            names = " ".join(name if needed else f"[{name}]" for name, _, needed in self._named)
            self.add_argument(
                "words",
                nargs="*",
                metavar=names,
                help="the options of these names, without the names, in this order",
            )
        return [(name, needed) for name, _, needed in self._named]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command's words; exits with code 2 when they make no sense."""
        self._as_json = "--json" in argv
        self.add_named_options()
        parsed = self.parse_intermixed_args(list(argv))
        words = list(vars(parsed).pop("words", ()))
        for name, _, _ in self._named:
            if words and getattr(parsed, name) is None:
                setattr(parsed, name, words.pop(0))
        if words:
            self.error(f"unexpected argument {words[0]!r}")
        for name, _, required in self._named:
            if required and getattr(parsed, name) is None:
                self.error(f"--{name} is missing")
        return parsed

    def error(self, message: str) -> NoReturn:
        """End with one line and where to find more, or with the result that a program expects."""
        from qmpmirror.cli.render import Output  # noqa: PLC0415 - only for a mistake

        hint = f"see {self.prog} --help"
        output = Output(as_json=self._as_json)
        output.error(f"{message} ({hint})")
        output.event(
            "result",
            outcome="error",
            exit=int(Exit.USAGE),
            error="UsageError",
            message=message,
            hint=hint,
            left=[],
        )
        sys.exit(Exit.USAGE)


def add_waiting(parser: Parser, what: str) -> None:
    """Add virsh's flags about waiting."""
    parser.add_argument("--bytes", action="store_true", help="a bare --bandwidth is in bytes/s")
    parser.add_argument("--wait", action="store_true", help=f"wait for {what} to end")
    parser.add_argument("--verbose", action="store_true", help="show progress while waiting")
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="wait, and abort when it takes longer"
    )
    parser.add_argument(
        "--async", dest="async_", action="store_true", help="do not wait for an abort itself"
    )


def check_waiting(parser: Parser, parsed: argparse.Namespace) -> None:
    """Make sense of them, and of the bandwidth."""
    parsed.wait |= parsed.timeout is not None
    for given, flag in ((parsed.verbose, "--verbose"), (parsed.async_, "--async")):
        if given and not parsed.wait:
            parser.error(f"{flag} needs --wait")
    parser.read_limit(parsed)


def bandwidth(text: str, *, in_bytes: bool) -> int:
    """A bandwidth in bytes/s.

    As with virsh, a bare number is MiB/s, or bytes/s with ``--bytes``; suffixes are k, M, G, T, P
    and E for powers of 1024, the same with ``iB``, and with ``B`` for powers of 1000.

    Raises:
        ValueError: with a sentence for the user.
    """
    value = size(text, default=1 if in_bytes else _MIB, what="bandwidth")
    if not 0 <= value <= _MAX_INT64:
        raise ValueError(f"bandwidth {text!r} is out of range: give 0 (no limit) to 7E")
    return value


def size(text: str, *, default: int = 1, what: str = "size") -> int:
    """A number of bytes; ``default`` is the unit of a bare number.

    Raises:
        ValueError: with a sentence for the user.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{what} {text!r} is no number with a suffix such as k, M, G")
    number, letter, ending, plain = match.groups()
    if plain:
        return int(number)
    if letter is None:
        return int(number) * default
    base = 1000 if (ending or "").lower() == "b" else 1024
    factor: int = base ** (_SUFFIXES.index(letter.lower()) + 1)
    return int(number) * factor


def key_values(options: Sequence[str]) -> dict[str, str]:
    """``-o key=value,key=value`` as a dictionary; ``,,`` is a comma.

    Raises:
        ValueError: with a sentence for the user.
    """
    parsed: dict[str, str] = {}
    for option in options:
        for part in re.split(r"(?<!,),(?!,)", option):
            key, equals, value = part.replace(",,", ",").partition("=")
            if not equals or not key:
                raise ValueError(f"-o {option!r} is not KEY=VALUE")
            parsed[key] = value
    return parsed


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _MAX_INT64:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


seconds: Final[Any] = _seconds
"""For options that take seconds."""
