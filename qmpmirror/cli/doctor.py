# SPDX-License-Identifier: MIT
"""``qmpmirror doctor``: one page about a QEMU, to be pasted into a bug report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror import __version__
from qmpmirror.cli.arguments import Parser
from qmpmirror.cli.render import Output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from qmpmirror.job import JobStatus
    from qmpmirror.operations.doctor import Checkup


def parser() -> Parser:
    """The command's parser."""
    made = Parser(
        "doctor",
        "Show on one page what a bug report needs: QEMU's version and what it can do, disks,"
        " chains, jobs, exports, bitmaps, what of it is ours, and what looks wrong. Changes"
        " nothing. Passwords in addresses are left out.",
        "qmpmirror doctor testvm",
    )
    made.add_domain()
    made.add_common()
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    arguments = parser().parse(argv)
    from qmpmirror.cli.run import run  # noqa: PLC0415 - brings asyncio

    output = Output(as_json=arguments.json)
    return run(lambda interrupts: interrupts.guard(_examine(arguments, output)), output)


async def _examine(arguments: argparse.Namespace, output: Output) -> int:
    from qmpmirror.cli.run import open_machine  # noqa: PLC0415 - brings asyncio
    from qmpmirror.operations.doctor import examine, without_secrets  # noqa: PLC0415 - as above

    async with await open_machine(arguments) as vm:
        found = await examine(vm.monitor, await vm.schema())
    output.say(without_secrets("\n".join(_page(found))))
    output.event("checkup", **_clean(_fields(found)))
    output.event("result", outcome="done", exit=0)
    return 0


def _page(found: Checkup) -> Iterator[str]:
    import platform  # noqa: PLC0415 - only here

    package = f" ({found.package})" if found.package else ""
    yield f"QEMU        {_dotted(found.version)}{package}"
    if found.machine:
        yield f"machine     {found.machine}, {found.target}, {found.accel or 'accel unknown'}"
        yield f"guest       {found.name or '(no name)'}: {found.status}"
    else:
        yield "machine     none: a storage daemon"
    yield f"qmpmirror   {__version__}, Python {platform.python_version()}, {platform.system()}"
    known = [name for name, there in found.capabilities.items() if there]
    lacking = [name for name, there in found.capabilities.items() if not there]
    yield from _section("can", [", ".join(known)])
    yield from _section("cannot", [", ".join(lacking)] if lacking else [])
    yield from _section("disks", _disks(found))
    yield from _section("chains", _chains(found))
    yield from _section("jobs", (_job(job, found) for job in found.jobs))
    yield from _section("exports", (_export(export) for export in found.exports))
    yield from _section("bitmaps", _bitmaps(found))
    yield from _section("iothreads", found.iothreads)
    yield from _section("objects", found.objects)
    yield from _section("nodes of ours", found.our_nodes)
    hazards = (f"hazard {number}: {what}" for number, what in found.hazards().items())
    yield from _section("bugs of this QEMU that qmpmirror guards against", hazards)
    yield from _section("looks wrong", found.problems())


def _section(title: str, lines: Iterable[str]) -> list[str]:
    lines = [line for text in lines for line in text.splitlines()]
    if not lines:
        return ["", f"{title}: none"]
    return ["", f"{title}:", *(f"  {line}" for line in lines)]


def _disks(found: Checkup) -> Iterator[str]:
    for disk in found.disks:
        status = found.io_status.get(disk.name)
        yield disk.describe() + (f"  [io-status {status}]" if status else "")


def _chains(found: Checkup) -> list[str]:
    from qmpmirror.cli.chains import draw  # noqa: PLC0415 - only here

    if found.picture is None:
        return ["(the block graph could not be read)"]
    with_medium = [disk for disk in found.disks if disk.node]
    return draw(found.picture, with_medium).splitlines()


def _job(job: JobStatus, found: Checkup) -> str:
    told = f"{job.id}: {job.type}, {job.status}, {job.current} of {job.total}"
    block_job = next((info for info in found.block_jobs if info["device"] == job.id), None)
    if block_job is not None:
        told += f", speed {block_job['speed']}, io-status {block_job['io-status']}"
    for run in found.runs:
        ours = (run.job, run.file, run.data, run.header)
        name = next((one.name for one in ours if one and one.status.id == job.id), None)
        if name is not None:
            flags = " ".join(sorted(flag.name.lower() for flag in name.flags)) or "no flags"
            marks = " ".join(sorted(mark.value for mark in run.marks)) or "no marks"
            base = f" to {name.base}" if name.base else ""
            told += f"\n  ours: {name.verb} of {name.source or '-'}{base}, run {run.id}"
            told += f", {flags}, {marks}"
    return told


def _export(export: Mapping[str, Any]) -> str:
    going = ", shutting down" if export["shutting-down"] else ""
    return f"{export['id']}: {export['type']} of {export['node-name']}{going}"


def _bitmaps(found: Checkup) -> Iterator[str]:
    for node in found.picture.nodes.values() if found.picture else ():
        for bitmap in node.bitmaps:
            words = [f"granularity {bitmap.granularity}", f"{bitmap.count} bytes dirty"]
            words += ["persistent"] if bitmap.persistent else []
            words += ["recording"] if bitmap.recording else []
            words += ["inconsistent"] if bitmap.inconsistent else []
            yield f"{bitmap.name or '(of a job)'} of {node.name}: {', '.join(words)}"


def _fields(found: Checkup) -> dict[str, Any]:
    return {
        "version": list(found.version),
        "package": found.package,
        "name": found.name,
        "status": found.status,
        "target": found.target,
        "machine": found.machine,
        "accel": found.accel,
        "capabilities": dict(found.capabilities),
        "disks": [
            {"names": disk.describe(), "io_status": found.io_status.get(disk.name, "")}
            for disk in found.disks
        ],
        "chains": _chains(found),
        "jobs": [_job(job, found) for job in found.jobs],
        "exports": [_export(export) for export in found.exports],
        "bitmaps": [*_bitmaps(found)],
        "iothreads": list(found.iothreads),
        "objects": list(found.objects),
        "our_nodes": found.our_nodes,
        "hazards": list(found.hazards()),
        "problems": found.problems(),
    }


def _clean(value: Any) -> Any:
    """The same without secrets, in every text."""
    from qmpmirror.operations.doctor import without_secrets  # noqa: PLC0415 - loaded by now

    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {name: _clean(item) for name, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
