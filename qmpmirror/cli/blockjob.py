# SPDX-License-Identifier: MIT
"""``qmpmirror blockjob``: see, steer and end the block job of a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
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
    made.add_domain()
    made.add_disk()
    made.add_named("bandwidth", "the limit in MiB/s, or with a suffix; 0: none", required=False)
    modes = made.add_mutually_exclusive_group()
    for flag, text in _MODES.items():
        modes.add_argument(flag, action="store_true", help=text)
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
    _check_modes(made, arguments)
    if arguments.bandwidth is not None:
        try:
            arguments.bandwidth = words.bandwidth(arguments.bandwidth, in_bytes=arguments.bytes)
        except ValueError as error:
            made.error(str(error))
    output = Output(as_json=arguments.json, label="Block Copy")
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio
    from qmpmirror.cli.steering import steer  # noqa: PLC0415 - brings asyncio and qemu.qmp

    return run(lambda interrupts: steer(arguments, output, interrupts), output)


def _check_modes(made: words.Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other; those that imply an abort turn into one."""
    mode = next((flag for flag in _MODES if getattr(arguments, _name(flag))), "")
    if arguments.bandwidth is not None:
        if mode:
            made.error(f"--bandwidth does not go with {mode}")
        mode = "--bandwidth"
    goes_with = {
        "--async": ("", "--abort", "--pivot"),
        "--force": ("", "--abort"),
        "--raw": ("", "--info"),
        "--bytes": ("", "--info", "--bandwidth"),
    }
    for flag, modes in goes_with.items():
        if getattr(arguments, _name(flag)) and mode not in modes:
            made.error(f"{flag} does not go with {mode}")
    implied = arguments.async_ or arguments.force
    if implied and (arguments.raw or arguments.bytes):
        made.error("--raw and --bytes do not go with --async or --force")
    arguments.abort |= implied and not mode


def _name(flag: str) -> str:
    return {"--async": "async_"}.get(flag, flag.removeprefix("--").replace("-", "_"))
