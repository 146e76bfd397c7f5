# SPDX-License-Identifier: MIT
"""One job and the person who watches it: what they see, and the exit code."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import errors
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.render import human_size
from qmpmirror.cli.run import Interrupted
from qmpmirror.cli.telling import progress_told
from qmpmirror.cli.wording import COPY, Words, launch_words
from qmpmirror.life import Ending, Phase
from qmpmirror.operations.together import ends_now

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from qmpmirror.cli.render import Output
    from qmpmirror.cli.run import Interrupts
    from qmpmirror.monitor import Event
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.twophase import TwoPhaseJob
    from qmpmirror.sizes import ImageSize


@attrs.define
class JobSession:
    """Follows a job of two phases for a person; a context manager that explains its failures.

    Attributes:
        handle: the job.
        output: where to tell of it.
        interrupts: Ctrl-C.
        wanted: the ending that is going to be asked for, if any.
        words: what is said of it.
        verbose: whether to show the progress, and the sizes in the end.
        code: the exit code, in the end.
    """

    handle: TwoPhaseJob
    output: Output
    interrupts: Interrupts
    wanted: Ending | None = None
    words: Words = COPY
    verbose: bool = False
    code: Exit = Exit.DONE
    _stopped: bool = attrs.field(default=False, init=False)
    _unsubscribe: Callable[[], None] | None = attrs.field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self._unsubscribe = self.handle.monitor.subscribe(self._tell_of_stops)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._unsubscribe is not None:
            self._unsubscribe()
        if isinstance(exc, errors.JobFailed):
            if self.handle.result is None:
                self._failed(exc)
            else:  # somebody else has ended it, perhaps just as was wanted here
                self._ended(self.handle.result, self.wanted, Exit.DONE)
            return True
        if isinstance(exc, errors.ConnectionLost):
            raise await self._explained(exc) from exc
        if isinstance(exc, errors.CommandFailed):
            self.output.note(f"job {self.handle.id} goes on in QEMU; qmpmirror blockjob shows it")
        return False

    def _tell_of_stops(self, event: Event | None) -> None:
        """Nobody should wait for a job that waits for them."""
        if event is None:
            return
        if event.name == "BLOCK_JOB_ERROR" and event.data.get("device") == self.handle.id:
            if event.data.get("action") == "stop":
                self._tell_of_stop()
        elif event.name == "JOB_STATUS_CHANGE" and event.data.get("id") == self.handle.id:
            self._stopped &= event.data.get("status") != "running"

    def _tell_of_stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.output.note(
                "stopped by an I/O error: make room, or mend it, then blockjob --resume lets it go"
                " on; --abort ends it"
            )

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
            self.output.event("mirroring", job=self.handle.id)
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
            await self.handle.request(ending, force=force)
            return self._goes_on(f"{ending.value} asked for", Exit.DONE)
        try:
            result = await self.interrupts.guard(self._end(ending, force=force))
        except Interrupted:
            return self._goes_on("interrupted", Exit.FAILED)
        return self._ended(result, ending, code)

    async def follow(self, *, wait: bool, seconds: float | None, see_end_through: bool) -> None:
        """See the job through to the ending that is wanted, as far as was asked.

        Args:
            wait: whether to wait for the mirroring phase.
            seconds: abort it when that phase is not reached in this time.
            see_end_through: whether to wait for the ending itself.
        """
        if not wait:
            return await self.leave_running(self.words.started)
        in_time = await self.watch(seconds=seconds)
        if in_time is not True:
            # Ctrl-C, or the timeout: as with virsh, both abort the job.
            code = Exit.FAILED if in_time is None else Exit.DEADLINE
            why = "interrupted" if in_time is None else f"not there within {seconds:g} s"
            self.output.note(f"{why}: it is aborted")
            return await self.end(Ending.ABORT, code=code, wait=see_end_through)
        if self.wanted is None:
            return await self.leave_running(self.words.mirroring)
        return await self.end(self.wanted, wait=see_end_through)

    async def leave_running(self, message: str) -> None:
        """Say something and leave the job to QEMU, unless it has failed at once."""
        # With virsh a job that fails at once looks like a success.
        await self.handle.job.refresh()
        if self.handle.job.life.concluded:
            await self.handle.ready()
        self.output.say(message)
        self.output.note("blockjob shows it and ends it: --watch, --pivot, --abort")
        self.output.event(
            "result", outcome=self.handle.phase.value, exit=int(Exit.DONE), job=self.handle.id
        )

    async def _watch(self, *, seconds: float | None) -> bool:
        with suppress(errors.JobNotFound):
            if (await self.handle.info()).io_status != "ok":
                self._tell_of_stop()  # that was before we listened
        reports = self.handle.progress()
        async with progress_told(reports, self.output, verbose=self.verbose) as telling:
            in_time = await self.handle.ready(seconds=seconds)
            if telling is not None and in_time:
                await telling
        return in_time

    async def _end(self, ending: Ending, *, force: bool) -> Result:
        if ending is Ending.PIVOT:
            return await self.handle.pivot()
        if ending is Ending.FINISH:
            return await self.handle.finish()
        return await self.handle.abort(force=force)

    def _ended(self, result: Result, asked: Ending | None, code: Exit) -> None:
        if result.outcome is Phase.ABORTED:
            self.output.say(f"{self.words.noun} aborted")
            self.code = code
            if asked is not Ending.ABORT:
                self.output.note("somebody else has cancelled it")
                self.code = Exit.FAILED
        elif asked is not None and (result.outcome is Phase.PIVOTED) is (asked is Ending.PIVOT):
            self.output.say(self.words.success(result.outcome))
            self.code = code
        else:
            self.output.say(
                f"{self.words.noun} failed: somebody else ended it: {result.outcome.value}"
            )
            self.code = Exit.FAILED
        self._tell_images(result)
        for note in result.notes:
            self.output.note(f"note: {note}")
        self._tell_left(result.left)
        self.output.event("result", exit=int(self.code), **self._result_fields(result))

    def _failed(self, error: errors.JobFailed) -> None:
        """Say that the copy failed, and why: virsh drops the reason."""
        self.code = Exit.FAILED
        self.output.say(f"{self.words.noun} failed: {error.reason}")
        if error.removed:
            self.output.note(f"{error.removed} was incomplete and has been removed")
        if error.authoritative:
            self.output.note(f"the guest runs on {error.authoritative}")
        self._tell_left(error.left)
        self.output.event(
            "result",
            outcome="failed",
            exit=int(self.code),
            reason=error.reason,
            active=error.authoritative,
            removed=bool(error.removed),
            left=list(error.left),
            job=self.handle.id,
        )

    def _goes_on(self, why: str, code: Exit) -> None:
        self.code = code
        self.output.note(
            f"{why}: job {self.handle.id} goes on in QEMU; qmpmirror blockjob shows it, qmpmirror"
            " recover puts it away when it has ended"
        )
        self.output.event(
            "result", outcome=self.handle.phase.value, exit=int(code), job=self.handle.id
        )

    async def _explained(self, error: errors.ConnectionLost) -> errors.ConnectionLost:
        """What the loss of the connection means for the two images."""
        source, destination = self.handle.disk.path, self.handle.destination
        pivoting = self.handle.job.life.asked is Ending.PIVOT
        pid = self.handle.monitor.pid
        if pid is not None and await ends_now(pid):
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
                f"job {self.handle.id} may go on in QEMU; the guest runs on {now}, as qmpmirror"
                f" domblklist shows; qmpmirror recover picks the {self.handle.what} up"
            )
        return errors.ConnectionLost(what, job_id=self.handle.id, hint=advice)

    def _tell_images(self, result: Result) -> None:
        if result.outcome is Phase.PIVOTED:
            again = launch_words(result)
            self.output.note(f"the guest runs on {result.active}; open it next time with: {again}")
            for path in result.deleted:
                self.output.note(f"{path} has been removed")
        else:
            for sentence in self.words.images(result):
                self.output.note(sentence)
        if self.verbose and result.source_size and result.destination_size:
            self.output.note(
                f"the source is {_size(result.source_size)}; the copy"
                f" {_size(result.destination_size)}"
            )

    def _tell_left(self, left: tuple[str, ...]) -> None:
        self.output.left(left)
        if left and self.code is Exit.DONE:
            self.code = Exit.NOT_CLEAN

    def _result_fields(self, result: Result) -> dict[str, Any]:
        fields = attrs.asdict(result) | {"outcome": result.outcome.value, "job": self.handle.id}
        fields["left"], fields["notes"] = list(result.left), list(result.notes)
        fields["launch"] = list(result.launch)
        return fields


def _size(size: ImageSize) -> str:
    if size.allocated is None:
        return human_size(size.virtual)
    return f"{human_size(size.virtual)}, {human_size(size.allocated)} of it allocated"
