# SPDX-License-Identifier: MIT
"""A copy on the command line, from the first command to the exit code."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import errors, launch
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.run import Interrupted
from qmpmirror.life import Ending, Phase
from qmpmirror.machine import Machine, connect

if TYPE_CHECKING:
    import argparse

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.operations.blockcopy import Plan
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.operations.options import Options

_SUCCESS = {Phase.PIVOTED: "Successfully pivoted", Phase.FINISHED: "Successfully copied"}


async def copy_disk(
    arguments: argparse.Namespace, options: Options, output: Output, interrupts: Interrupts
) -> int:
    """``qmpmirror blockcopy`` with its parsed arguments; return the exit code."""
    ending = _ending(arguments)
    async with await interrupts.guard(_open(arguments)) as vm:
        plan = await interrupts.guard(vm.plan_blockcopy(arguments.path, arguments.dest, options))
        if arguments.print_qmp:
            for command in [*plan.commands(), *plan.ending_commands(ending)]:
                print(json.dumps(command.as_qmp()))
            return Exit.DONE
        try:
            copy = await interrupts.guard(vm.start(plan))
        except Interrupted:
            output.say("Copy aborted")
            output.event("result", outcome="aborted", exit=int(Exit.FAILED))
            return Exit.FAILED
        output.event("started", **_start_fields(plan))
        session = CopySession(copy, plan, output, interrupts)
        try:
            return await session.follow(arguments, ending)
        except errors.JobFailed as error:
            return session.failed(error)
        except errors.ConnectionLost as error:
            raise session.explain(error) from error


@attrs.define
class CopySession:
    """One running copy and the person who watches it."""

    copy: Copy
    plan: Plan
    output: Output
    interrupts: Interrupts

    async def follow(self, arguments: argparse.Namespace, ending: Ending | None) -> int:
        """See the copy through, as far as was asked; return the exit code."""
        if not arguments.wait:
            return await self._leave_running("Block Copy started")
        try:
            in_time = await self.interrupts.guard(
                self._watch(seconds=arguments.timeout, verbose=arguments.verbose)
            )
        except Interrupted:
            return await self._abort(Exit.FAILED)
        if not in_time:
            return await self._abort(Exit.DEADLINE)
        self.output.event("mirroring", job=self.copy.id)
        if ending is None:
            return await self._leave_running("Now in mirroring phase")
        try:
            return self._ended(await self.interrupts.guard(self._end(ending)), ending, Exit.DONE)
        except Interrupted:
            return self._goes_on()

    def failed(self, error: errors.JobFailed) -> int:
        """Say that the copy failed, and why: virsh drops the reason."""
        self.output.say(f"Copy failed: {error.reason}")
        if error.authoritative:
            self.output.note(f"the guest runs on {error.authoritative}")
        for left in error.left:
            self.output.error(f"could not be cleaned up: {left}")
        self.output.event(
            "result",
            outcome="failed",
            exit=int(Exit.FAILED),
            reason=error.reason,
            active=error.authoritative,
            left=list(error.left),
        )
        return Exit.FAILED

    def explain(self, error: errors.ConnectionLost) -> errors.ConnectionLost:
        """What the loss of the connection means for the two images."""
        source, destination = self.copy.disk.path, self.copy.destination
        pivoting = self.copy.job.life.asked is Ending.PIVOT
        pid = self.copy.monitor.pid
        if pid is not None and not os.path.exists(f"/proc/{pid}"):
            what = f"QEMU (pid {pid}) has ended"
            advice = (
                f"the guest was being switched: {destination} holds all it wrote if the switch was"
                f" done, {source} if not"
                if pivoting
                else f"{source} holds all that the guest wrote; {destination} is not complete"
            )
        else:
            what = error.description
            advice = (
                f"job {self.copy.id} may go on in QEMU; the guest's image is"
                f" {'what' if pivoting else source + ', as'} qmpmirror domblklist shows"
            )
        return errors.ConnectionLost(what, job_id=self.copy.id, hint=advice)

    async def _watch(self, *, seconds: float | None, verbose: bool) -> bool:
        """Wait for the mirroring phase, telling how far it is; False when time ran out."""
        import asyncio  # noqa: PLC0415 - loaded by now

        async def tell() -> None:
            async for progress in self.copy.progress():
                if verbose:
                    self.output.progress(progress)
                self.output.event("progress", **_progress_fields(progress))

        telling = asyncio.create_task(tell()) if verbose or self.output.as_json else None
        try:
            in_time = await self.copy.ready(seconds=seconds)
            if telling is not None and in_time:
                await telling
        finally:
            if telling is not None:
                telling.cancel()
        return in_time

    async def _end(self, ending: Ending) -> Result:
        return await (self.copy.pivot() if ending is Ending.PIVOT else self.copy.finish())

    async def _abort(self, code: Exit) -> int:
        try:
            result = await self.interrupts.guard(self.copy.abort())
        except Interrupted:
            return self._goes_on()
        return self._ended(result, Ending.ABORT, code)

    def _ended(self, result: Result, asked: Ending, code: Exit) -> int:
        if result.outcome is Phase.ABORTED or asked is Ending.ABORT:
            self.output.say("Copy aborted")
            code = code if asked is Ending.ABORT else Exit.FAILED
        elif (result.outcome is Phase.PIVOTED) is (asked is Ending.PIVOT):
            self.output.say(_SUCCESS[result.outcome])
        else:
            self.output.say(f"Copy failed: somebody else ended it: {result.outcome.value}")
            code = Exit.FAILED
        self._tell_images(result)
        for left in result.left:
            self.output.error(f"could not be cleaned up: {left}")
        if result.left and code is Exit.DONE:
            code = Exit.NOT_CLEAN
        self.output.event("result", exit=int(code), **self._result_fields(result))
        return code

    def _tell_images(self, result: Result) -> None:
        if result.outcome is Phase.PIVOTED:
            words = " ".join(_quoted(word) for word in self._launch(result))
            self.output.note(f"the guest runs on {result.active}; open it next time with: {words}")
        elif result.removed:
            self.output.note(f"{result.destination} was incomplete and has been removed")
        elif not result.consistent:
            self.output.note(f"{result.destination} is incomplete: do not use it")
        elif result.outcome is Phase.ABORTED:
            self.output.note(f"{result.destination} is a consistent copy")

    async def _leave_running(self, message: str) -> int:
        # A job that fails at once must not look like a success, as it does with virsh.
        await self.copy.job.refresh()
        if self.copy.job.life.concluded:
            await self.copy.ready()
        self.output.say(message)
        self.output.event(
            "result", outcome=self.copy.phase.value, exit=int(Exit.DONE), job=self.copy.id
        )
        return Exit.DONE

    def _goes_on(self) -> int:
        self.output.note(
            f"left to QEMU: job {self.copy.id} goes on; {self.copy.disk.path} is the guest's image"
            " until it has ended"
        )
        self.output.event(
            "result", outcome=self.copy.phase.value, exit=int(Exit.FAILED), job=self.copy.id
        )
        return Exit.FAILED

    def _launch(self, result: Result) -> list[str]:
        return launch.options(self.copy.disk, result.active, self.plan.destination.format)

    def _result_fields(self, result: Result) -> dict[str, Any]:
        fields = attrs.asdict(result) | {"outcome": result.outcome.value, "job": self.copy.id}
        fields["left"] = list(result.left)
        if result.outcome is Phase.PIVOTED:
            fields["launch"] = self._launch(result)
        return fields


async def _open(arguments: argparse.Namespace) -> Machine:
    return await connect(
        arguments.domain, timeout=arguments.connect_timeout, transcript=arguments.transcript
    )


def _ending(arguments: argparse.Namespace) -> Ending | None:
    # As with virsh, both together end gracefully on the copy.
    if arguments.pivot:
        return Ending.PIVOT
    return Ending.FINISH if arguments.finish else None


def _start_fields(plan: Plan) -> dict[str, Any]:
    return {
        "job": str(plan.job),
        "disk": plan.disk.name,
        "source": plan.disk.path,
        "destination": plan.destination.path,
        "format": plan.destination.format,
        "shallow": plan.shallow,
    }


def _progress_fields(progress: Any) -> dict[str, Any]:
    fields = attrs.asdict(progress) | {"phase": progress.phase.value, "percent": progress.percent}
    fields["rate"] = round(progress.rate)
    return fields


def _quoted(word: str) -> str:
    import shlex  # noqa: PLC0415 - only after a pivot

    return shlex.quote(word)
