# SPDX-License-Identifier: MIT
"""``qmpmirror snapshot-create-as``: virsh's command for external snapshots of running disks."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.machine import Machine

_SPEC = {"file", "snapshot", "driver", "stype"}


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "snapshot-create-as",
        "Put a fresh overlay over the active image of each disk, all at one instant. The old images"
        " stay as they are from then on.",
        "qmpmirror snapshot-create-as testvm before-upgrade --disk-only --diskspec vdb,snapshot=no",
    )
    made.add_domain()
    made.add_named("name", "of the snapshot (default: the time)", required=False)
    made.add_argument("--disk-only", action="store_true", help="required: no memory is saved here")
    made.add_argument(
        "--diskspec",
        action="append",
        default=[],
        metavar="DISK[,file=FILE][,snapshot=external|no]",
        help="where the overlay of a disk goes (default: its path with NAME as suffix)",
    )
    made.add_argument(
        "--reuse-external", action="store_true", help="the overlays have been made by the user"
    )
    made.add_argument("--atomic", action="store_true", help="accepted: it always is all or nothing")
    made.add_argument("--no-metadata", action="store_true", help="accepted: there never is any")
    made.add_argument(
        "--quiesce", action="store_true", help="freeze the guest's file systems meanwhile"
    )
    made.add_argument("--agent", metavar="PATH", help="the guest agent's socket, for --quiesce")
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    if not arguments.disk_only:
        made.error("--disk-only is needed: memory cannot be saved here")
    if arguments.quiesce is not bool(arguments.agent):
        made.error("--quiesce and --agent need each other")
    try:
        specs = dict(_spec(text) for text in arguments.diskspec)
    except ValueError as error:
        made.error(str(error))
    if len(specs) < len(arguments.diskspec):
        made.error("a disk has two --diskspec")
    if arguments.name is None:
        arguments.name = str(int(time.time()))
    output = Output(as_json=arguments.json)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(
        lambda interrupts: interrupts.guard(_create(arguments, specs, output), takes_back=True),
        output,
    )


def _spec(text: str) -> tuple[str, dict[str, str]]:
    disk, _, rest = text.partition(",")
    try:
        given = words.key_values([rest] if rest else [])
    except ValueError:
        raise ValueError(f"--diskspec {text!r} is not DISK,KEY=VALUE") from None
    unknown = set(given) - _SPEC
    if unknown or not disk:
        raise ValueError(f"--diskspec {text!r}: {', '.join(sorted(unknown)) or 'disk'} is unknown")
    if given.get("snapshot", "external") not in {"external", "no"}:
        raise ValueError(f"--diskspec {text!r}: only external snapshots can be made here")
    if given.get("driver", "qcow2") != "qcow2" or given.get("stype", "file") != "file":
        raise ValueError(f"--diskspec {text!r}: an overlay is a qcow2 file")
    return disk, given


async def _create(
    arguments: argparse.Namespace, specs: dict[str, dict[str, str]], output: Output
) -> int:
    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio

    async with await open_machine(arguments) as vm:
        overlays = await _overlays(vm, arguments.name, specs)
        taken = await vm.snapshot(
            overlays, reuse_external=arguments.reuse_external, agent=arguments.agent or ""
        )
    output.say(f"Domain snapshot {arguments.name} created")
    for each in taken.snapshots:
        again = shlex.join(each.launch)
        output.note(f"{each.disk} is on {each.overlay}; open it next time with: {again}")
    if taken.filesystems == 0:
        output.note("warning: the guest agent has frozen no file system")
    for what in taken.left:
        output.error(what)
    code = Exit.NOT_CLEAN if taken.left else Exit.DONE
    output.event(
        "result",
        outcome="created",
        exit=int(code),
        left=list(taken.left),
        name=arguments.name,
        filesystems=taken.filesystems,
        disks=[
            {"disk": each.disk, "source": each.source, "overlay": each.overlay}
            | {"launch": list(each.launch)}
            for each in taken.snapshots
        ],
    )
    return code


async def _overlays(vm: Machine, name: str, specs: dict[str, dict[str, str]]) -> dict[str, str]:
    """Where the overlay of each disk goes; as with virsh, a disk without a word is one of them."""
    from qmpmirror import disks, errors  # noqa: PLC0415 - only now
    from qmpmirror.operations.snapshot import default_file  # noqa: PLC0415 - brings qemu.qmp

    known = await vm.disks()
    given = {disks.find(known, word).node: spec for word, spec in specs.items()}
    overlays = {}
    for disk in known:
        image = disk.image
        can = image is not None and not image.read_only and disks.is_fixed(disk)
        spec = given.get(disk.node, {} if can else {"snapshot": "no"})
        if spec.get("snapshot") != "no":
            overlays[disk.node] = spec.get("file") or default_file(disk.path, name)
    if not overlays:
        raise errors.Refused("there is no disk to take a snapshot of")
    return overlays
