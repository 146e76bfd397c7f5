# SPDX-License-Identifier: MIT
"""``qmpmirror blockcopy``: virsh's command, flag by flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror.cli import arguments as words
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.operations.options import Options


_SUMMARY = (
    "Copy a disk under the live guest. When the copy mirrors the disk, pivot to it, finish with"
    " a consistent point-in-time copy, or leave both to later."
)
_EXAMPLE = "qmpmirror blockcopy testvm vda /export/copy.qcow2 --shallow --wait --verbose --pivot"


def parser(
    command: str = "blockcopy", summary: str = _SUMMARY, example: str = _EXAMPLE
) -> words.Parser:
    """The command's parser; `backup` has the same options."""
    made = words.Parser(command, summary, example)
    made.add_domain()
    made.add_disk(required=False)
    copy = "the copy: a path, nbd://HOST/EXPORT, or json:{...} of blockdev-add"
    made.add_named("dest", copy, required=False)
    made.add_limit()
    _add_virsh_options(made)
    _add_other_options(made)
    _add_group_options(made)
    made.add_common()
    return made


def _add_virsh_options(made: words.Parser) -> None:
    group = made.add_argument_group("virsh's options")
    flags = {
        "--shallow": "copy the active layer only and share its backing chain",
        "--reuse-external": "the destination was prepared by the user: do not format it",
        "--blockdev": "the destination is a block device",
        "--dest-is-zero": "the destination is known to read as zeroes (QEMU 10.1)",
        "--raw": "the same as --format raw",
        "--bytes": "a bare --bandwidth is in bytes/s",
        "--synchronous-writes": "guest writes wait for both images",
        "--transient-job": "accepted for virsh's sake; there is no domain definition here",
        "--wait": "wait for the mirroring phase",
        "--verbose": "show progress while waiting",
        "--pivot": "wait, then switch the guest to the copy",
        "--finish": "wait, then end with a consistent copy; the guest stays",
    }
    for flag, text in flags.items():
        group.add_argument(flag, action="store_true", help=text)
    group.add_argument(
        "--async", dest="async_", action="store_true", help="do not wait for the ending itself"
    )
    group.add_argument("--format", metavar="FORMAT", help="of the copy (default: the source's)")
    group.add_argument(
        "--granularity", default="0", metavar="BYTES", help="of the dirty bitmap, a power of two"
    )
    group.add_argument(
        "--buf-size", default="0", metavar="BYTES", help="how much is in flight at once"
    )
    group.add_argument(
        "--timeout",
        type=words.seconds,
        metavar="SECONDS",
        help="wait, and abort when the mirroring phase is not reached in time",
    )


def _add_group_options(made: words.Parser) -> None:
    group = made.add_argument_group("several disks at one point in time (beyond virsh)")
    group.add_argument(
        "--diskspec",
        action="append",
        default=[],
        metavar="DISK,dest=DEST[,format=FORMAT][,shallow=on]",
        help="a disk of several; in the place of PATH and DEST",
    )
    group.add_argument("--all-disks", action="store_true", help="all disks with a medium")
    group.add_argument(
        "--dest-dir",
        metavar="DIR",
        help="the folder, which must be there, of the copies of all disks: vda.qcow2 and so on",
    )
    group.add_argument(
        "--max-freeze",
        type=words.seconds,
        default=500.0,
        metavar="MS",
        help="how long the guest's writes may wait for the cut (default: 500 milliseconds)",
    )
    group.add_argument(
        "--quiesce", action="store_true", help="freeze the guest's file systems around the cut"
    )
    group.add_argument("--agent", metavar="PATH", help="the guest agent's socket, for --quiesce")


def _add_other_options(made: words.Parser) -> None:
    group = made.add_argument_group("beyond virsh")
    flags = {
        "--overwrite": "format a destination that holds something",
        "--check-base": "compare a prepared image's base with the source's, by qemu-img",
        "--keep-source": "leave the old image open after a pivot",
    }
    for flag, text in flags.items():
        group.add_argument(flag, action="store_true", help=text)
    group.add_argument(
        "-o",
        dest="creation",
        action="append",
        default=[],
        metavar="KEY=VALUE[,...]",
        help="creation options of the new image, as for qemu-img create",
    )
    group.add_argument(
        "--secret", metavar="FILE", help="passphrase; a new image is encrypted with LUKS"
    )
    group.add_argument("--tls-creds", metavar="DIR", help="TLS credentials for an NBD destination")
    group.add_argument(
        "--server-timeout",
        type=words.seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for a destination's server that is not up yet",
    )
    group.add_argument(
        "--detect-zeroes",
        choices=("off", "on", "unmap"),
        default="",
        help="turn zeroes that are written to the copy into holes (default: as the source)",
    )
    group.add_argument(
        "--via",
        default="blockdev-mirror",
        choices=("blockdev-mirror", "drive-mirror"),
        help="the QMP command to use",
    )
    group.add_argument(
        "--on-error",
        default="report",
        choices=("report", "stop", "ignore", "enospc"),
        help="what an I/O error does to the job (default: report, which ends it)",
    )
    group.add_argument(
        "--no-safe-start",
        action="store_true",
        help="do not stop the vCPUs for an instant on QEMUs that miss writes at the start",
    )
    group.add_argument(
        "--print-qmp",
        action="store_true",
        help="show the QMP commands, checked against this QEMU, and change nothing",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return run_parsed(parser(), argv)


def run_parsed(made: words.Parser, argv: Sequence[str]) -> int:
    """Run the command, or `backup`; return its exit code."""
    arguments = made.parse(argv)
    if made.prog.endswith("backup") and (arguments.pivot or arguments.async_):
        made.error("a backup neither pivots nor leaves its end to QEMU: that is blockcopy")
    if arguments.bandwidth is None:
        arguments.bandwidth = "0"
    arguments.wait |= bool(arguments.pivot or arguments.finish or arguments.timeout)
    for given, flag in ((arguments.verbose, "--verbose"), (arguments.async_, "--async")):
        if given and not arguments.wait:
            made.error(f"{flag} requires at least one of --timeout, --wait, --pivot, or --finish")
    options = _options(made, arguments)
    several = bool(arguments.diskspec or arguments.all_disks)
    _check_which(made, arguments, several=several)
    output = Output(as_json=arguments.json, label="Block Copy")
    from qmpmirror.cli.copying import copy_disk  # noqa: PLC0415 - brings asyncio and qemu.qmp
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    if several:
        from qmpmirror.cli.grouping import copy_disks  # noqa: PLC0415 - as above

        return run(lambda interrupts: copy_disks(arguments, options, output, interrupts), output)
    return run(lambda interrupts: copy_disk(arguments, options, output, interrupts), output)


def _check_which(made: words.Parser, arguments: argparse.Namespace, *, several: bool) -> None:
    """Either one disk and its copy, or several."""
    if arguments.diskspec and arguments.all_disks:
        made.error("give either --diskspec or --all-disks")
    if arguments.all_disks is not bool(arguments.dest_dir):
        made.error("--all-disks and --dest-dir need each other")
    if arguments.quiesce is not bool(arguments.agent):
        made.error("--quiesce and --agent need each other")
    if several:
        _check_several(made, arguments)
        return
    if arguments.quiesce:
        made.error("--quiesce goes with --diskspec or --all-disks")
    for name in ("path", "dest"):
        if getattr(arguments, name) is None:
            made.error(f"--{name} is missing")


def _check_several(made: words.Parser, arguments: argparse.Namespace) -> None:
    if arguments.path is not None or arguments.dest is not None:
        made.error("--diskspec and --all-disks take the place of PATH and DEST")
    if not (arguments.pivot or arguments.finish):
        made.error("several disks need --pivot or --finish: they are ended together")
    if arguments.print_qmp:
        made.error("--print-qmp shows one disk: give PATH and DEST")
    if arguments.async_:
        made.error("--async leaves one disk to QEMU; several are ended here, together")


def _options(made: words.Parser, arguments: argparse.Namespace) -> Options:
    from qmpmirror.operations.options import Options  # noqa: PLC0415 - brings attrs

    if arguments.raw and arguments.format not in {None, "raw"}:
        made.error("--raw and --format are mutually exclusive")
    try:
        return Options(
            shallow=arguments.shallow,
            format="raw" if arguments.raw else arguments.format or "",
            bandwidth=words.bandwidth(arguments.bandwidth, in_bytes=arguments.bytes),
            granularity=words.size(arguments.granularity, what="granularity"),
            buf_size=words.size(arguments.buf_size, what="buf-size"),
            synchronous_writes=arguments.synchronous_writes,
            via=arguments.via,
            on_error=arguments.on_error,
            safe_start=not arguments.no_safe_start,
            reuse_external=arguments.reuse_external,
            overwrite=arguments.overwrite,
            blockdev=arguments.blockdev,
            creation=words.key_values(arguments.creation),
            secret=arguments.secret or "",
            tls_creds=arguments.tls_creds or "",
            server_seconds=arguments.server_timeout,
            detect_zeroes=arguments.detect_zeroes,
            dest_is_zero=arguments.dest_is_zero,
            keep_source=arguments.keep_source,
            check_base=arguments.check_base,
            then="pivot" if arguments.pivot else "finish" if arguments.finish else "",
        )
    except ValueError as error:
        made.error(str(error))
