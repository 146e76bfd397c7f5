# SPDX-License-Identifier: MIT
"""``qmpmirror migrate``: virsh's migration with copied storage, between two QEMUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpmirror.cli import arguments as words
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import Output, human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.cli.run import Interrupts
    from qmpmirror.errors import MigrationFailed
    from qmpmirror.operations.migration import MigrationProgress, MigrationResult

_FLAGS = {
    "--copy-storage-synchronous-writes": "guest writes wait for both sides once the disks mirror",
    "--live": "accepted for virsh's sake; a guest that runs is always migrated live",
    "--timeout-suspend": "accepted for virsh's sake: what --timeout does",
    "--verbose": "show progress",
    "--bytes": "a bare --bandwidth is in bytes/s",
}


def parser() -> words.Parser:
    """The command's parser."""
    made = words.Parser(
        "migrate",
        "Move a live guest to a second QEMU that does not share its storage: one that was started"
        " with -incoming defer, the same guest hardware, and images of the same size. On any"
        " failure the guest runs on at the source.",
        "qmpmirror migrate testvm destvm --copy-storage-all --verbose",
    )
    made.add_domain()
    made.add_named("desturi", "the QEMU that waits for the guest, named as DOMAIN is")
    where = "where it waits for the memory: tcp://HOST:PORT or unix:///PATH"
    made.add_named("migrateuri", where, required=False)
    storage = made.add_mutually_exclusive_group(required=True)
    storage.add_argument(
        "--copy-storage-all", action="store_true", help="copy each disk with its whole chain"
    )
    storage.add_argument(
        "--copy-storage-inc",
        action="store_true",
        help="copy active images only; the destination's stand on bases that hold the same",
    )
    for flag, text in _FLAGS.items():
        made.add_argument(flag, action="store_true", help=text)
    _add_values(made)
    made.add_common()
    return made


def _add_values(made: words.Parser) -> None:
    made.add_argument(
        "--migrate-disks",
        default="",
        metavar="DISK,...",
        help="the disks to copy (default: all that are written to and not shared)",
    )
    made.add_argument(
        "--disks-uri",
        default="",
        metavar="URI",
        help="where the disks are offered: tcp://HOST:PORT or unix:///PATH",
    )
    made.add_argument(
        "--tls", default="", metavar="DIR", help="TLS for all, with the credentials in DIR"
    )
    made.add_argument(
        "--bandwidth",
        default="0",
        metavar="MIB",
        help="limit for each disk and for the memory, in MiB/s or with a suffix (500K, 2G)",
    )
    made.add_argument(
        "--timeout",
        type=words.seconds,
        metavar="SECONDS",
        help="suspend the guest when it takes longer, so that it ends; it runs on over there",
    )
    made.add_argument(
        "--no-safe-start",
        action="store_true",
        help="do not stop the vCPUs for an instant on QEMUs that miss writes at the start",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    made = parser()
    arguments = made.parse(argv)
    try:
        arguments.bandwidth = words.bandwidth(arguments.bandwidth, in_bytes=arguments.bytes)
    except ValueError as error:
        made.error(str(error))
    output = Output(as_json=arguments.json, label="Migration")
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    return run(lambda interrupts: _migrate(arguments, output, interrupts), output)


async def _migrate(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    from qmpmirror.cli.run import Interrupted, open_machine  # noqa: PLC0415 - brings asyncio
    from qmpmirror.errors import MigrationFailed  # noqa: PLC0415 - loaded by now
    from qmpmirror.machine import connect  # noqa: PLC0415 - brings qemu.qmp

    results: list[MigrationResult] = []

    def tell(progress: MigrationProgress) -> None:
        if progress.result is not None:
            results.append(progress.result)
        if arguments.verbose:
            output.progress(progress)
        output.event("progress", **progress.fields())

    there = connect(
        arguments.desturi,
        timeout=arguments.connect_timeout,
        transcript=f"{arguments.transcript}.destination" if arguments.transcript else None,
    )
    async with await interrupts.guard(open_machine(arguments)) as source, there as destination:
        moving = source.migrate(destination, report=tell, **_options(arguments))
        try:
            return _migrated(await interrupts.guard(moving, takes_back=True), output)
        except Interrupted:
            if results:  # it came too late
                return _migrated(results[0], output)
            output.say("Migration aborted")
            output.note("the guest is at the source, as before")
            output.event("result", outcome="aborted", exit=int(Exit.FAILED))
            return Exit.FAILED
        except MigrationFailed as error:
            return _failed(error, output)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "incremental": arguments.copy_storage_inc,
        "disks": tuple(filter(None, arguments.migrate_disks.split(","))),
        "synchronous_writes": arguments.copy_storage_synchronous_writes,
        "tls_creds": arguments.tls,
        "bandwidth": arguments.bandwidth,
        "disks_uri": arguments.disks_uri,
        "migrate_uri": arguments.migrateuri or "",
        "suspend_after": arguments.timeout,
        "safe_start": not arguments.no_safe_start,
    }


def _migrated(result: MigrationResult, output: Output) -> int:
    for note in result.notes:
        output.note(f"note: {note}")
    what = "runs" if result.running else "is paused, as it was,"
    output.say("Migration complete")
    output.note(
        f"the guest {what} at the destination, on {', '.join(result.images)}; it stood still for"
        f" {result.downtime} ms, {human_size(result.memory)} of memory went over"
    )
    output.left(result.left)
    code = Exit.NOT_CLEAN if result.left else Exit.DONE
    output.event(
        "result",
        outcome="migrated",
        exit=int(code),
        disks=list(result.disks),
        images=list(result.images),
        running=result.running,
        downtime=result.downtime,
        total_time=result.total_time,
        memory=result.memory,
        notes=list(result.notes),
        left=list(result.left),
    )
    return code


def _failed(error: MigrationFailed, output: Output) -> int:
    output.say(f"Migration failed: {error.reason}")
    output.note(str(error))
    where = {"source": "the guest is at the source, as before", "nowhere": "the guest runs nowhere"}
    output.note(where.get(error.runs_on, "it is not known where the guest runs"))
    output.left(error.left)
    output.event(
        "result",
        outcome="failed",
        exit=int(Exit.FAILED),
        reason=error.reason,
        message=error.description,
        hint=error.hint,
        runs_on=error.runs_on,
        left=list(error.left),
    )
    return Exit.FAILED
