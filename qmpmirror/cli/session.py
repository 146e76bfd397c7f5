# SPDX-License-Identifier: MIT
"""One copy and the person who watches it: what they see, and the exit code."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover, errors
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import human_size
from qmpmirror.cli.run import Interrupted
from qmpmirror.life import Ending, Phase

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.sizes import ImageSize

_ENDING_CHECKS: Final = 40
_ENDING_PAUSE: Final = 0.05
_SUCCESS = {Phase.PIVOTED: "Successfully pivoted", Phase.FINISHED: "Successfully copied"}


@attrs.define
class CopySession:
    """Follows a copy for a person; a context manager that explains failures of the copy.

    Attributes:
        copy: the copy.
        output: where to tell of it.
        interrupts: Ctrl-C.
        wanted: the ending that is going to be asked for, if any.
        verbose: whether to show the progress, and the sizes in the end.
        code: the exit code, in the end.
    """

    copy: Copy
    output: Output
    interrupts: Interrupts
    wanted: Ending | None = None
    verbose: bool = False
    code: Exit = Exit.DONE

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(exc, errors.JobFailed):
            if self.copy.result is None:
                self._failed(exc)
            else:  # somebody else has ended it, perhaps just as was wanted here
                self._ended(self.copy.result, self.wanted, Exit.DONE)
            return True
        if isinstance(exc, errors.ConnectionLost):
            raise await self._explained(exc) from exc
        if isinstance(exc, errors.CommandFailed):
            self.output.note(f"job {self.copy.id} goes on in QEMU; qmpmirror blockjob shows it")
        return False

    async def watch(self, *, seconds: float | None = None) -> bool | None:
        """Wait for the mirroring phase, telling how far it is.

        Returns:
            True in the mirroring phase, False when time ran out, None after Ctrl-C.
        """
        try:
            reached = await self.interrupts.guard(self._watch(seconds=seconds))
        except Interrupted:
            return None
        if reached:
            self.output.event("mirroring", job=self.copy.id)
        return reached

    async def end(
        self,
        ending: Ending,
        *,
        code: Exit = Exit.DONE,
        force: bool = False,
        wait: bool = True,
    ) -> None:
        """Ask for an ending, and wait for it unless told otherwise.

        Args:
            ending: which one.
            code: the exit code when it succeeds.
            force: with an abort: at once.
            wait: whether to see it through.
        """
        if not wait:
            await self.copy.request(ending, force=force)
            return self._goes_on(f"{ending.value} asked for", Exit.DONE)
        try:
            result = await self.interrupts.guard(self._end(ending, force=force))
        except Interrupted:
            return self._goes_on("interrupted", Exit.FAILED)
        return self._ended(result, ending, code)

    async def leave_running(self, message: str) -> None:
        """Say something and leave the copy to QEMU, unless it has failed at once."""
        # With virsh a job that fails at once looks like a success.
        await self.copy.job.refresh()
        if self.copy.job.life.concluded:
            await self.copy.ready()
        self.output.say(message)
        self.output.event(
            "result", outcome=self.copy.phase.value, exit=int(Exit.DONE), job=self.copy.id
        )

    async def _watch(self, *, seconds: float | None) -> bool:
        async def tell() -> None:
            async for progress in self.copy.progress():
                if self.verbose:
                    self.output.progress(progress)
                self.output.event("progress", **progress.fields())

        telling = asyncio.create_task(tell()) if self.verbose or self.output.as_json else None
        try:
            in_time = await self.copy.ready(seconds=seconds)
            if telling is not None and in_time:
                await telling
        finally:
            if telling is not None:
                telling.cancel()
                # Its error, if any, is that of ready() too.
                await asyncio.gather(telling, return_exceptions=True)
        return in_time

    async def _end(self, ending: Ending, *, force: bool) -> Result:
        if ending is Ending.PIVOT:
            return await self.copy.pivot()
        if ending is Ending.FINISH:
            return await self.copy.finish()
        return await self.copy.abort(force=force)

    def _ended(self, result: Result, asked: Ending | None, code: Exit) -> None:
        if result.outcome is Phase.ABORTED:
            self.output.say("Copy aborted")
            self.code = code
            if asked is not Ending.ABORT:
                self.output.note("somebody else has cancelled it")
                self.code = Exit.FAILED
        elif asked is not None and (result.outcome is Phase.PIVOTED) is (asked is Ending.PIVOT):
            self.output.say(_SUCCESS[result.outcome])
            self.code = code
        else:
            self.output.say(f"Copy failed: somebody else ended it: {result.outcome.value}")
            self.code = Exit.FAILED
        self._tell_images(result)
        self._tell_left(result.left)
        self.output.event("result", exit=int(self.code), **self._result_fields(result))

    def _failed(self, error: errors.JobFailed) -> None:
        """Say that the copy failed, and why: virsh drops the reason."""
        self.code = Exit.FAILED
        self.output.say(f"Copy failed: {error.reason}")
        if error.authoritative:
            self.output.note(f"the guest runs on {error.authoritative}")
        self._tell_left(error.left)
        self.output.event(
            "result",
            outcome="failed",
            exit=int(self.code),
            reason=error.reason,
            active=error.authoritative,
            left=list(error.left),
            job=self.copy.id,
        )

    def _goes_on(self, why: str, code: Exit) -> None:
        self.code = code
        self.output.note(
            f"{why}: job {self.copy.id} goes on in QEMU; qmpmirror blockjob shows it, qmpmirror"
            " recover puts it away when it has ended"
        )
        self.output.event("result", outcome=self.copy.phase.value, exit=int(code), job=self.copy.id)

    async def _explained(self, error: errors.ConnectionLost) -> errors.ConnectionLost:
        """What the loss of the connection means for the two images."""
        source, destination = self.copy.disk.path, self.copy.destination
        pivoting = self.copy.job.life.asked is Ending.PIVOT
        pid = self.copy.monitor.pid
        if pid is not None and await _has_ended(pid):
            what = f"QEMU (pid {pid}) has ended"
            advice = f"{source} holds all that the guest wrote; {destination} is not complete"
            if pivoting:
                advice = (
                    f"the guest was being switched: {destination} holds all that it wrote if the"
                    f" switch was done, {source} if not"
                )
        else:
            what = error.description
            now = "one of both images" if pivoting else source
            advice = (
                f"job {self.copy.id} may go on in QEMU; the guest runs on {now}, as qmpmirror"
                " domblklist shows; qmpmirror recover picks the copy up"
            )
        return errors.ConnectionLost(what, job_id=self.copy.id, hint=advice)

    def _tell_images(self, result: Result) -> None:
        if result.outcome is Phase.PIVOTED:
            words = shlex.join(result.launch)
            self.output.note(f"the guest runs on {result.active}; open it next time with: {words}")
        elif result.removed:
            self.output.note(f"{result.destination} was incomplete and has been removed")
        elif not result.consistent:
            self.output.note(f"{result.destination} is incomplete: do not use it")
        elif result.outcome is Phase.ABORTED:
            self.output.note(f"{result.destination} is a consistent copy")
        if self.verbose and result.source_size and result.destination_size:
            self.output.note(
                f"the source is {_words(result.source_size)}; the copy"
                f" {_words(result.destination_size)}"
            )

    def _tell_left(self, left: tuple[str, ...]) -> None:
        for what in left:
            self.output.error(f"could not be cleaned up: {what}")
        if left and self.code is Exit.DONE:
            self.code = Exit.NOT_CLEAN

    def _result_fields(self, result: Result) -> dict[str, Any]:
        fields = attrs.asdict(result) | {"outcome": result.outcome.value, "job": self.copy.id}
        fields["left"], fields["notes"] = list(result.left), list(result.notes)
        fields["launch"] = list(result.launch)
        return fields


def _words(size: ImageSize) -> str:
    if size.allocated is None:
        return human_size(size.virtual)
    return f"{human_size(size.virtual)}, {human_size(size.allocated)} of it allocated"


async def _has_ended(pid: int) -> bool:
    """Whether a QEMU has ended that has just hung up: it does that a moment before."""
    for _ in range(_ENDING_CHECKS):
        if discover.has_ended(pid):
            return True
        await asyncio.sleep(_ENDING_PAUSE)
    return discover.has_ended(pid)
