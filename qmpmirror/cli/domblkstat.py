# SPDX-License-Identifier: MIT
"""``qmpmirror domblkstat``: virsh's numbers of what the guest has read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qmpmirror.cli.arguments import Parser
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

_HUMAN: Final[Mapping[str, str]] = {
    "rd_req": "number of read operations:",
    "rd_bytes": "number of bytes read:",
    "wr_req": "number of write operations:",
    "wr_bytes": "number of bytes written:",
    "errs": "error count:",
    "flush_operations": "number of flush operations:",
    "rd_total_times": "total duration of reads (ns):",
    "wr_total_times": "total duration of writes (ns):",
    "flush_total_times": "total duration of flushes (ns):",
}
"""virsh's labels."""


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "domblkstat",
        "Show what the guest has read and written, of one disk or of all together.",
        "qmpmirror domblkstat testvm vda --human",
    )
    made.add_domain()
    made.add_named("device", "the disk: target (vda), device id, node name, path", required=False)
    made.add_argument("--human", action="store_true", help="with words")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    arguments = parser().parse(argv)
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: interrupts.guard(_stat(arguments, output)), output)


async def _stat(arguments: argparse.Namespace, output: Output) -> int:
    import attrs  # noqa: PLC0415 - as late as everything else here

    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio

    async with await open_machine(arguments) as vm:
        chosen = [await vm.disk(arguments.device)] if arguments.device else await vm.disks()
        numbers = attrs.asdict(await vm.traffic(chosen))
    name = chosen[0].name if arguments.device else ""
    if arguments.human:
        lines = [f"Device: {name}"]
        lines += [f" {_HUMAN[key]:<31} {value}" for key, value in numbers.items()]
    else:
        lines = [f"{name} {key} {value}" for key, value in numbers.items()]
    output.say("\n".join(lines) + "\n")
    output.event("stat", device=name, **numbers)
    output.event("result", outcome="done", exit=0)
    return 0
