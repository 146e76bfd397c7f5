# SPDX-License-Identifier: MIT
"""``blockcommit`` and ``blockpull`` with their parsed arguments, up to the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror import errors
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.run import Interrupted, open_machine
from qmpmirror.cli.session import JobSession
from qmpmirror.cli.telling import progress_told
from qmpmirror.cli.wording import ACTIVE_COMMIT, COMMIT, PULL, Words
from qmpmirror.life import Ending, Phase
from qmpmirror.operations.onephase import OnePhaseJob

if TYPE_CHECKING:
    import argparse

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.operations.blockcommit import CommitKeywords
    from qmpmirror.operations.conclusion import Result


async def commit(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    """``qmpmirror blockcommit``; return the exit code."""
    ending = Ending.PIVOT if arguments.pivot else None
    ending = Ending.FINISH if arguments.keep_overlay else ending
    options: CommitKeywords = {
        "top": arguments.top or "",
        "base": arguments.base or "",
        "shallow": arguments.shallow,
        "active": arguments.active,
        "delete": arguments.delete,
        "bandwidth": arguments.bandwidth,
        "keep_relative": arguments.keep_relative,
        "then": ending.value if ending else "",
    }
    async with await interrupts.guard(open_machine(arguments)) as vm:
        try:
            starting = vm.blockcommit(arguments.path, **options)
            handle = await interrupts.guard(starting, takes_back=True)
        except Interrupted:
            return COMMIT.aborted(output)
        output.event("started", job=handle.id, disk=handle.disk.name, base=handle.destination)
        if isinstance(handle, OnePhaseJob):
            return await _follow(handle, arguments, output, interrupts, COMMIT)
        async with JobSession(
            handle,
            output,
            interrupts,
            wanted=ending,
            words=ACTIVE_COMMIT,
            verbose=arguments.verbose,
        ) as session:
            await session.follow(
                wait=arguments.wait,
                seconds=arguments.timeout,
                see_end_through=not arguments.async_,
            )
        return session.code


async def pull(arguments: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    """``qmpmirror blockpull``; return the exit code."""
    async with await interrupts.guard(open_machine(arguments)) as vm:
        try:
            starting = vm.blockpull(
                arguments.path,
                base=arguments.base or "",
                bandwidth=arguments.bandwidth,
                keep_relative=arguments.keep_relative,
            )
            handle = await interrupts.guard(starting, takes_back=True)
        except Interrupted:
            return PULL.aborted(output)
        output.event("started", job=handle.id, disk=handle.disk.name)
        return await _follow(handle, arguments, output, interrupts, PULL)


async def _follow(
    handle: OnePhaseJob,
    arguments: argparse.Namespace,
    output: Output,
    interrupts: Interrupts,
    words: Words,
) -> int:
    """See a job of one phase through, as far as was asked."""
    if not arguments.wait:
        output.say(words.started)
        output.note("qmpmirror recover puts the images away when it has ended")
        output.event("result", outcome="copying", exit=int(Exit.DONE), job=handle.id)
        return Exit.DONE
    code = Exit.DEADLINE
    try:
        try:
            result = await interrupts.guard(_end(handle, arguments, output))
        except Interrupted:
            result, code = None, Exit.FAILED
        if result is None:
            if arguments.async_:
                await handle.request_abort()
                return words.aborted(output, code)
            result = await handle.abort()
    except errors.JobFailed as error:
        return _failed(error, words, output)
    except errors.ConnectionLost as error:
        advice = f"job {handle.id} may go on in QEMU; qmpmirror recover picks it up"
        raise errors.ConnectionLost(error.description, job_id=handle.id, hint=advice) from error
    return _ended(result, code, words, output)


async def _end(handle: OnePhaseJob, arguments: argparse.Namespace, output: Output) -> Result | None:
    reports = handle.progress(until_mirroring=False)
    async with progress_told(reports, output, verbose=arguments.verbose):
        return await handle.end(seconds=arguments.timeout)


def _ended(result: Result, code: Exit, words: Words, output: Output) -> int:
    if result.outcome is Phase.ABORTED:
        output.say(f"{words.noun} aborted")
    else:
        output.say(words.finished)
        code = Exit.NOT_CLEAN if result.left else Exit.DONE
    for sentence in words.images(result):
        output.note(sentence)
    output.left(result.left)
    output.event(
        "result", exit=int(code), **(attrs.asdict(result) | {"outcome": result.outcome.value})
    )
    return code


def _failed(error: errors.JobFailed, words: Words, output: Output) -> int:
    output.say(f"{words.noun} failed: {error.reason}")
    output.note(f"the guest runs on {error.authoritative}")
    output.event(
        "result",
        outcome="failed",
        exit=int(Exit.FAILED),
        reason=error.reason,
        active=error.authoritative,
    )
    return Exit.FAILED
