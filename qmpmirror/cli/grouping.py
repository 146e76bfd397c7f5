# SPDX-License-Identifier: MIT
"""Copies of several disks on the command line, ended at one point in time."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import errors
from qmpmirror.agent import frozen
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.run import Interrupted, open_machine
from qmpmirror.life import Ending, Phase
from qmpmirror.operations.group import Member
from qmpmirror.operations.handle import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.machine import Machine
    from qmpmirror.operations.group import CopyGroup, GroupResult
    from qmpmirror.operations.options import Options


async def copy_disks(
    arguments: argparse.Namespace, options: Options, output: Output, interrupts: Interrupts
) -> int:
    """``qmpmirror blockcopy`` with several disks; return the exit code."""
    ending = Ending.PIVOT if arguments.pivot else Ending.FINISH
    async with await interrupts.guard(open_machine(arguments)) as vm:
        members = await interrupts.guard(_members(vm, arguments, options))
        freeze = arguments.max_freeze / 1000
        try:
            group = await interrupts.guard(vm.blockcopy_group(members, max_freeze=freeze))
        except Interrupted:
            return _aborted(output, Exit.FAILED)
        if arguments.quiesce:
            group.around_cut = lambda: frozen(arguments.agent)
        output.event("started", group=group.id, disks=[member.disk for member in members])
        return await _follow(group, ending, arguments, output, interrupts)


async def _follow(
    group: CopyGroup,
    ending: Ending,
    arguments: argparse.Namespace,
    output: Output,
    interrupts: Interrupts,
) -> int:
    code = Exit.FAILED
    try:
        watching = _watch(group, output, arguments)
        if await interrupts.guard(watching):
            output.event("mirroring", group=group.id)
            end = group.pivot() if ending is Ending.PIVOT else group.finish()
            return _ended(await interrupts.guard(end), ending, output)
        code = Exit.DEADLINE
    except Interrupted:
        pass
    except errors.JobFailed as error:
        output.say(f"Copy failed: {error.reason}")
        output.event("result", outcome="failed", exit=int(Exit.FAILED), reason=error.reason)
        return Exit.FAILED
    await group.abort()
    return _aborted(output, code)


async def _members(vm: Machine, arguments: argparse.Namespace, options: Options) -> list[Member]:
    if arguments.all_disks:
        return [
            _in_folder(disk.name, disk.image.driver, arguments.dest_dir, options)
            for disk in await vm.disks()
            if disk.image is not None and disk.qom_path and not disk.removable
        ]
    return [_parsed(spec, options) for spec in arguments.diskspec]


def _in_folder(name: str, driver: str, folder: str, options: Options) -> Member:
    suffix = options.format or driver
    return Member(name, os.path.join(folder, f"{name}.{suffix}"), options)


def _parsed(spec: str, options: Options) -> Member:
    """``vda,dest=/a.qcow2,format=raw,shallow=on``."""
    from qmpmirror.cli.arguments import key_values  # noqa: PLC0415 - loaded by now

    disk, _, rest = spec.partition(",")
    try:
        given = key_values([rest] if rest else [])
    except ValueError as error:
        raise errors.UsageError(f"--diskspec {spec!r}: {error}") from None
    destination = given.pop("dest", "")
    if not disk or not destination:
        raise errors.UsageError(f"--diskspec {spec!r} needs DISK,dest=DEST")
    changes: dict[str, Any] = {}
    if "format" in given:
        changes["format"] = given.pop("format")
    if "shallow" in given:
        changes["shallow"] = given.pop("shallow") in {"on", "yes", "true"}
    if given:
        raise errors.UsageError(f"--diskspec {spec!r}: {next(iter(given))} is unknown")
    return Member(disk, destination, attrs.evolve(options, **changes))


async def _watch(group: CopyGroup, output: Output, arguments: argparse.Namespace) -> bool:
    async def tell() -> None:
        async for each in group.progress():
            whole = _together(each)
            if arguments.verbose:
                output.progress(whole)
            output.event("progress", **whole.fields())

    telling = asyncio.create_task(tell()) if arguments.verbose or output.as_json else None
    try:
        reached = await group.ready(seconds=arguments.timeout)
        if telling is not None and reached:
            await telling
    finally:
        if telling is not None:
            telling.cancel()
            await asyncio.wait([telling])
    return reached


def _together(each: Sequence[Progress]) -> Progress:
    """The progress of all disks as that of one."""
    copying = any(progress.phase is Phase.COPYING for progress in each)
    rate = sum(progress.rate for progress in each)
    offset = sum(progress.offset for progress in each)
    length = sum(progress.length for progress in each)
    return Progress(
        phase=Phase.COPYING if copying else Phase.MIRRORING,
        offset=offset,
        length=length,
        rate=rate,
        eta=(length - offset) / rate if rate else None,
    )


def _ended(result: GroupResult, ending: Ending, output: Output) -> int:
    wanted = Phase.PIVOTED if ending is Ending.PIVOT else Phase.FINISHED
    done = result.outcome is wanted
    if done:
        pivoted = wanted is Phase.PIVOTED
        output.say("Successfully pivoted" if pivoted else "Successfully copied")
        output.note(f"the guest's writes waited {result.longest_freeze * 1000:.1f} ms")
    else:
        each = ", ".join(f"{one.disk} {one.outcome.value}" for one in result.results)
        output.say(f"Copy failed: {each}")
    left = [entry for one in result.results for entry in one.left]
    for entry in left:
        output.error(f"could not be cleaned up: {entry}")
    code = Exit.FAILED if not done else Exit.NOT_CLEAN if left else Exit.DONE
    output.event(
        "result",
        outcome=result.outcome.value,
        exit=int(code),
        freeze=result.longest_freeze,
        disks=[attrs.asdict(one) | {"outcome": one.outcome.value} for one in result.results],
        cut=[attrs.asdict(cut) | {"freeze": cut.freeze} for cut in result.cuts],
    )
    return code


def _aborted(output: Output, code: Exit) -> int:
    output.say("Copy aborted")
    output.event("result", outcome="aborted", exit=int(code))
    return code
