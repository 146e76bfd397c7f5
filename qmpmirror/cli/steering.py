# SPDX-License-Identifier: MIT
"""What ``qmpmirror blockjob`` does with the job that it finds."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import errors, names
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import human_size
from qmpmirror.cli.run import open_machine
from qmpmirror.cli.session import JobSession
from qmpmirror.cli.wording import ACTIVE_COMMIT, COPY, MOVE
from qmpmirror.life import Ending, Phase
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.move import Move
from qmpmirror.operations.onephase import OnePhaseJob
from qmpmirror.operations.twophase import TwoPhaseJob

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.cli.wording import Words
    from qmpmirror.job import JobInfo
    from qmpmirror.machine import Machine
    from qmpmirror.operations.handle import BlockJob

_LABELS: Final[Mapping[str, str]] = {
    "mirror": "Block Copy",
    "stream": "Block Pull",
    "commit": "Block Commit",
    "backup": "Backup",
}
_MIB: Final = 1024 * 1024


async def steer(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    """``qmpmirror blockjob`` with its parsed arguments; return the exit code."""
    async with await interrupts.guard(open_machine(arguments)) as vm:
        handle = await interrupts.guard(vm.blockjob(arguments.path))
        if handle is None:
            return _no_job(arguments, output)
        if arguments.abort or arguments.pivot:
            return await _end(handle, arguments, output, interrupts)
        if arguments.watch:
            return await interrupts.guard(_watch(vm, handle, output, interrupts))
        if arguments.pause:
            await handle.pause()
        elif arguments.resume:
            await handle.resume()
        elif arguments.synchronous_writes:
            await _copy(handle).make_synchronous()
        elif arguments.bandwidth is not None:
            await handle.set_bandwidth(arguments.bandwidth)
        else:
            _show(await handle.info(), arguments, output)
            return Exit.DONE
        output.event("result", outcome="done", exit=int(Exit.DONE), job=handle.id)
        return Exit.DONE


def _no_job(arguments: argparse.Namespace, output: Output) -> int:
    wants_one = (
        arguments.abort
        or arguments.pivot
        or arguments.pause
        or arguments.resume
        or arguments.synchronous_writes
        or arguments.bandwidth is not None
    )
    if wants_one:
        raise errors.JobNotFound(
            f"disk {arguments.path} does not have an active block job", job_id=""
        )
    output.say(f"No current block job for {arguments.path}")
    output.event("result", outcome="none", exit=int(Exit.DONE))
    return Exit.DONE


async def _end(
    handle: BlockJob, arguments: argparse.Namespace, output: Output, interrupts: Interrupts
) -> int:
    if not isinstance(handle, TwoPhaseJob) and arguments.abort:
        await interrupts.guard(_cancel(handle, arguments))
        if arguments.async_:
            output.note(f"abort asked for: job {handle.id} ends by itself")
        else:
            output.say("Job aborted")
        outcome = "asked" if arguments.async_ else "aborted"
        output.event("result", outcome=outcome, exit=int(Exit.DONE), job=handle.id)
        return Exit.DONE
    ending = Ending.PIVOT if arguments.pivot else Ending.ABORT
    ours = _with_two_phases(handle)
    async with JobSession(ours, output, interrupts, words=_words(ours)) as session:
        await session.end(ending, force=arguments.force, wait=not arguments.async_)
    return session.code


def _words(handle: TwoPhaseJob) -> Words:
    if isinstance(handle, Move):
        return MOVE
    return COPY if isinstance(handle, Copy) else ACTIVE_COMMIT


async def _cancel(handle: BlockJob, arguments: argparse.Namespace) -> None:
    """End a job of one phase, or somebody else's."""
    if not isinstance(handle, OnePhaseJob):
        await handle.cancel(force=arguments.force, wait=not arguments.async_)
    elif arguments.async_:
        await handle.request_abort()
    else:
        await handle.abort()


async def _watch(vm: Machine, handle: BlockJob, output: Output, interrupts: Interrupts) -> int:
    """Show a job until it has ended, without ending it or putting anything away."""
    told = False
    async with _explaining(handle, output, interrupts):
        async for progress in handle.progress(until_mirroring=False):
            output.progress(progress)
            output.event("progress", **progress.fields())
            if progress.phase is Phase.MIRRORING and not told:
                told = True
                output.note("now in the mirroring phase: --pivot or --abort ends it")
    disk = next((d for d in await vm.disks() if d.is_under(handle.disk)), handle.disk)
    output.note(f"the job has ended; {disk.name} is on {disk.path}")
    output.event("result", outcome="ended", exit=int(Exit.DONE), active=disk.path, job=handle.id)
    return Exit.DONE


def _explaining(
    handle: BlockJob, output: Output, interrupts: Interrupts
) -> AbstractAsyncContextManager[object]:
    """A context that tells what the loss of the connection means, where that can be told."""
    if isinstance(handle, TwoPhaseJob):
        return JobSession(handle, output, interrupts)
    return nullcontext()


def _with_two_phases(handle: BlockJob) -> TwoPhaseJob:
    if isinstance(handle, OnePhaseJob):
        raise errors.Refused(
            f"job {handle.id} is a {handle.what} of one phase: it ends by itself, nothing pivots"
        )
    parsed = names.parse_job(handle.id)
    if parsed is not None and parsed.verb == "migrate":
        raise errors.Refused(
            f"job {handle.id} belongs to a migration, which alone may end it",
            hint="--abort makes the migration fail, and the guest runs on here",
        )
    if not isinstance(handle, TwoPhaseJob):
        raise errors.Refused(
            f"job {handle.id} was not started by qmpmirror: it can be shown, limited, paused and"
            " aborted, but only its owner knows how to end it"
        )
    return handle


def _copy(handle: BlockJob) -> Copy:
    handle = _with_two_phases(handle)
    if not isinstance(handle, Copy):
        raise errors.Refused(f"job {handle.id} is no copy: only a copy can be made synchronous")
    return handle


def _show(info: JobInfo, arguments: argparse.Namespace, output: Output) -> None:
    label = _LABELS.get(info.type, "Unknown job")
    parsed = names.parse_job(info.id)
    if info.type == "commit" and (info.ready or (parsed and parsed.has_two_phases)):
        label = f"Active {label}"
    speed = info.speed if arguments.bytes else -(-info.speed // _MIB)
    if arguments.raw:
        cur, end = _as_virsh(info)
        output.say(f" type={label}\n bandwidth={speed}\n cur={cur}\n end={end}")
    else:
        done = 100.0 if info.ready else _percent(info)
        output.say(f"{label}: [{done:5.2f} %]{' mirroring' if info.ready else ''}")
        if info.speed:
            output.say(f"    Bandwidth limit: {info.speed} bytes/s ({human_size(info.speed)}/s)")
        if info.paused:
            advice = "" if info.io_status == "ok" else ": make room, then --resume"
            output.say(f"    paused, I/O status {info.io_status}{advice}")
    output.event("job", **attrs.asdict(info), label=label)
    output.event("result", outcome="done", exit=int(Exit.DONE), job=info.id)


def _as_virsh(info: JobInfo) -> tuple[int, int]:
    """Done and to do, for scripts that take equal numbers for the mirroring phase."""
    done, length = (info.offset, info.length) if info.length else (int(info.ready), 1)
    return (done if info.ready else min(done, length - 1)), length


def _percent(info: JobInfo) -> float:
    return min(99.99, int(10000 * info.offset / info.length) / 100) if info.length else 0.0
