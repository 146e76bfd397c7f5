# SPDX-License-Identifier: MIT
"""Copies of several disks on the command line, ended at one point in time."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import disks, errors
from qmpmirror.agent import frozen
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.run import Interrupted, open_machine
from qmpmirror.cli.telling import progress_told
from qmpmirror.cli.wording import COPY, launch_words
from qmpmirror.life import Ending, Phase
from qmpmirror.operations.group import Member
from qmpmirror.operations.handle import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Sequence

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.machine import Machine
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.group import CopyGroup, GroupResult
    from qmpmirror.operations.options import Options

_SWITCH: Final = {"on": True, "yes": True, "off": False, "no": False}


async def copy_disks(
    arguments: argparse.Namespace, options: Options, output: Output, interrupts: Interrupts
) -> int:
    """``qmpmirror blockcopy`` with several disks; return the exit code."""
    async with await interrupts.guard(open_machine(arguments)) as vm:
        members = await interrupts.guard(_members(vm, arguments, options))
        freeze = arguments.max_freeze / 1000
        starting = vm.blockcopy_group(members, max_freeze=freeze)
        try:
            group = await interrupts.guard(starting, takes_back=True)
        except Interrupted:
            return COPY.aborted(output)
        for note in group.notes:
            output.note(f"note: {note}")
        if arguments.quiesce:
            group.around_cut = lambda: _quiesced(arguments.agent, output)
        output.event("started", group=group.id, disks=[copy.disk.name for copy in group.copies])
        return await _follow(group, arguments, output, interrupts)


async def _follow(
    group: CopyGroup, arguments: argparse.Namespace, output: Output, interrupts: Interrupts
) -> int:
    ending = Ending.PIVOT if arguments.pivot else Ending.FINISH
    code = Exit.FAILED
    try:
        if await interrupts.guard(_watch(group, output, arguments)):
            output.event("mirroring", group=group.id)
            end = group.pivot() if ending is Ending.PIVOT else group.finish()
            return _ended(await interrupts.guard(end, takes_back=True), ending, output)
        code = Exit.DEADLINE
    except Interrupted:
        if group.result is not None and group.result.outcome is not Phase.ABORTED:
            return _ended(group.result, ending, output)  # it came too late
    except errors.JobFailed as error:
        return _failed(error, output)
    except errors.ConnectionLost as error:
        advice = "the copies may go on in QEMU; qmpmirror recover picks them up"
        raise errors.ConnectionLost(error.description, hint=advice) from error
    if group.result is None:
        await group.abort()
    return COPY.aborted(output, code)


@asynccontextmanager
async def _quiesced(path: str, output: Output) -> AsyncIterator[None]:
    """The guest's file systems stand still, as the agent says."""
    async with frozen(path) as number:
        output.event("quiesced", filesystems=number)
        if not number:
            output.note("warning: the guest agent has frozen no file system")
        yield


async def _members(vm: Machine, arguments: argparse.Namespace, options: Options) -> list[Member]:
    if not arguments.all_disks:
        return [_parsed(spec, options) for spec in arguments.diskspec]
    members = [
        _in_folder(disk.name, disk.image.driver, arguments.dest_dir, options)
        for disk in await vm.disks()
        if disk.image is not None and disks.is_fixed(disk)
    ]
    if not members:
        raise errors.Refused("there is no disk to copy")
    return members


def _in_folder(name: str, driver: str, folder: str, options: Options) -> Member:
    suffix = options.format or driver
    return Member(name, os.path.join(folder, f"{name}.{suffix}"), options)


def _parsed(spec: str, options: Options) -> Member:
    """``vda,dest=/a.qcow2,format=raw,shallow=on``."""
    from qmpmirror.cli.arguments import key_values  # noqa: PLC0415 - loaded by now

    disk, _, rest = spec.partition(",")
    try:
        given = key_values([rest] if rest else [])
    except ValueError:
        raise errors.UsageError(f"--diskspec {spec!r}: not DISK,dest=DEST,KEY=VALUE") from None
    destination = given.pop("dest", "")
    if not disk or not destination:
        raise errors.UsageError(f"--diskspec {spec!r} needs DISK,dest=DEST")
    changes: dict[str, Any] = {}
    if "format" in given:
        changes["format"] = given.pop("format")
    if "shallow" in given:
        word = given.pop("shallow")
        if word not in _SWITCH:
            raise errors.UsageError(f"--diskspec {spec!r}: shallow={word} is neither on nor off")
        changes["shallow"] = _SWITCH[word]
    if given:
        raise errors.UsageError(f"--diskspec {spec!r}: {next(iter(given))} is unknown")
    return Member(disk, destination, attrs.evolve(options, **changes))


async def _watch(group: CopyGroup, output: Output, arguments: argparse.Namespace) -> bool:
    reports = _reports(group)
    async with progress_told(reports, output, verbose=arguments.verbose) as telling:
        reached = await group.ready(seconds=arguments.timeout)
        if telling is not None and reached:
            await telling
    return reached


async def _reports(group: CopyGroup) -> AsyncIterator[Progress]:
    async for each in group.progress():
        yield _together(each)


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
        for one in result.results:
            output.note(f"{one.disk}: {_whereabouts(one)}")
            for note in one.notes:
                output.note(f"note: {note}")
    else:
        output.say(f"Copy failed: {', '.join(map(_fate, result.results))}")
    output.left(result.left_over)
    code = Exit.FAILED if not done else Exit.NOT_CLEAN if result.left_over else Exit.DONE
    output.event(
        "result",
        outcome=result.outcome.value,
        exit=int(code),
        freeze=result.longest_freeze,
        disks=[attrs.asdict(one) | {"outcome": one.outcome.value} for one in result.results],
        left=list(result.left),
        cut=[attrs.asdict(cut) | {"freeze": cut.freeze} for cut in result.cuts],
    )
    return code


def _whereabouts(result: Result) -> str:
    if result.outcome is Phase.PIVOTED:
        return f"the guest runs on {result.active}; open it next time with: {launch_words(result)}"
    return f"{result.destination} is a consistent copy"


def _fate(result: Result) -> str:
    """What became of one disk, when they differ."""
    why = f" ({'; '.join(result.notes)})" if result.notes else ""
    return f"{result.disk} {result.outcome.value}{why}"


def _failed(error: errors.JobFailed, output: Output) -> int:
    output.say(f"Copy failed: {error.reason}")
    output.note(error.description)
    output.left(error.left)
    output.event(
        "result",
        outcome="failed",
        exit=int(Exit.FAILED),
        reason=error.reason,
        message=error.description,
        left=list(error.left),
    )
    return Exit.FAILED
