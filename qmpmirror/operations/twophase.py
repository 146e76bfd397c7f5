# SPDX-License-Identifier: MIT
"""A job of two phases under way: a copy, or the commit of an active image.

It copies; from the mirroring phase on it follows every write of the guest, until it is told how to
end. Whatever was asked for, the outcome is read back from QEMU's graph after the job has ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qmpmirror import errors, graph, names
from qmpmirror.job import PAUSED, STALL_SECONDS
from qmpmirror.life import Ending, IllegalTransitionError, Life, Phase
from qmpmirror.names import Flag, JobName, Mark
from qmpmirror.operations import cautions, marks
from qmpmirror.operations.cancelling import cancel_by_force
from qmpmirror.operations.conclusion import Result, conclude
from qmpmirror.operations.handle import BlockJob
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Graph
    from qmpmirror.sizes import ImageSize

_CONVERGE_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 1.0
_MARKS: Final = {
    Ending.PIVOT: Mark.PIVOT,
    Ending.FINISH: Mark.FINISH,
    Ending.ABORT: Mark.ABORT,
}


@attrs.define(eq=False, kw_only=True)
class TwoPhaseJob(BlockJob):
    """A job with three endings: a `BlockJob` whose ``disk`` is as it was at the start.

    Attributes:
        what: what it is, for messages.
        only_by_pivot: whether what it has written is of use only when the guest is switched to it.
        name: the job's id, taken apart.
        destination: where the data goes: the copy, or the base of a commit.
        format: that image's format.
        synchronous: whether this process has made the guest's writes wait for the target.
        notes: what the user must know, one sentence each.
        source_size: how large the source was just before a pivot, which closes it.
        result: how it has ended, whoever ended it; None while it goes on, and when it failed.
    """

    what: ClassVar[str] = "job"
    only_by_pivot: ClassVar[bool] = False

    name: JobName
    destination: str
    format: str
    synchronous: bool = attrs.field(default=False, init=False)
    notes: list[str] = attrs.field(factory=list, init=False)
    source_size: ImageSize | None = attrs.field(default=None, init=False)
    result: Result | None = attrs.field(default=None, init=False)

    @property
    def target_node(self) -> str:
        """The node that the job writes to."""
        return self.name.target_node

    @property
    def own_nodes(self) -> Sequence[str]:
        """The nodes that were opened for it, top down: closed unless the guest runs on them."""
        return ()

    def measure_source(self, picture: Graph) -> ImageSize | None:  # noqa: ARG002 - a hook
        """How large what it copies is, as long as its nodes are there."""
        return None

    def tidy_files(self, *, pivoted: bool) -> None:
        """Put away files besides ``destination`` that it has made."""

    def image_files(self) -> Sequence[str]:
        """The files that are to be removed when it has been successful."""
        return ()

    async def ready(
        self, *, seconds: float | None = None, stall_seconds: float = STALL_SECONDS
    ) -> bool:
        """Wait for the mirroring phase: from then on every write of the guest is followed.

        Cancelling this is safe; the job goes on.

        Args:
            seconds: return False after this long; the job goes on.
            stall_seconds: give up after this long without any progress.

        Raises:
            JobFailed: the job ended before.
            Stalled: no progress; the job goes on.
            ConnectionLost: the connection ended.
        """
        in_time = await self.job.wait(
            lambda life: life.mirrored, seconds=seconds, stall_seconds=stall_seconds
        )
        if self.job.life.concluded:
            result = await self.conclude()
            raise errors.JobFailed(
                f"somebody else ended the {self.what} of {self.disk.name}: {result.outcome.value}",
                job_id=self.id,
                reason=result.outcome.value,
                authoritative=result.active,
            )
        return in_time

    async def pivot(
        self, *, seconds: float | None = None, stall_seconds: float = STALL_SECONDS
    ) -> Result:
        """Switch the guest to the target (``job-complete``), and let go of the old image.

        While the guest writes faster than the target takes it, no instant comes at which both are
        equal; then its writes are made to wait for the target (``block-job-change``, QEMU 8.2).
        Cancelling this does not take the request back: the job goes on to its end.

        Args:
            seconds: give up waiting after this long.
            stall_seconds: give up waiting after this long without any progress.

        Raises:
            NotReady: the mirroring phase is not reached.
            EndingAlreadyAsked: an ending was asked for before, by whomever.
            JobFailed: the job failed; `JobFailed.authoritative` is the guest's image.
            DeadlineExceeded: ``seconds`` passed; the job goes on to its end.
            Stalled: no progress; the job goes on to its end.
            ConnectionLost: the connection ended; only QEMU knows the outcome.
        """
        return await self._end(Ending.PIVOT, seconds, stall_seconds)

    async def finish(
        self, *, seconds: float | None = None, stall_seconds: float = STALL_SECONDS
    ) -> Result:
        """Keep the target as it is at one instant; the guest stays (soft ``block-job-cancel``).

        Arguments, errors and cancelling: as for `pivot`.
        """
        return await self._end(Ending.FINISH, seconds, stall_seconds)

    async def abort(
        self,
        *,
        force: bool = False,
        seconds: float | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> Result:
        """End the job; the guest stays on its image.

        In the mirroring phase the target is brought to one instant first, and is consistent;
        before it a copy is worthless, and its file is removed if this run created it.

        Args:
            force: do not wait for consistency; a copy is worthless then.
            seconds: as for `pivot`.
            stall_seconds: as for `pivot`.

        Raises: as `pivot`.
        """
        return await self._end(Ending.ABORT, seconds, stall_seconds, force=force)

    async def request(self, ending: Ending, *, force: bool = False) -> None:
        """Ask for an ending and do not wait for it; `recover` puts away what it leaves.

        Raises:
            NotReady: EndingAlreadyAsked: as `pivot`.
        """
        await self._ask(ending, force=force)

    async def resume_ending(self) -> Result:
        """See an ending through that another process has asked for.

        That process may have died between writing its wish down and sending it. A cancel can be
        repeated; ``job-complete`` must not be, under a filter: it aborts QEMU before 10.0.10.
        """
        asked = self.job.life.asked
        while asked is not None and not await self._wait_for_conclusion(_CONVERGE_SECONDS):
            if asked is Ending.ABORT and not self.job.life.mirrored:
                await self._cancel()
            elif asked is not Ending.PIVOT:
                await self._send(asked)
            elif await self._may_complete_again():
                await self._check_pivot(await graph.read(self.monitor))
                await self._carry_bitmaps()
                await self._send(asked)
        return await self.conclude()

    async def _may_complete_again(self) -> bool:
        if self.disk.image is not None and self.disk.node == self.disk.image.name:
            return True
        # A job that has been told to complete ends as soon as it has nothing left to copy.
        info = await self.info()
        return info.ready and not info.paused and info.offset == info.length

    async def _end(
        self,
        ending: Ending,
        seconds: float | None,
        stall_seconds: float,
        *,
        force: bool = False,
    ) -> Result:
        if self.result is not None:
            raise self._already()
        if not self.job.life.concluded:
            try:
                await self._ask(ending, force=force)
            except errors.JobFailed:
                raise
            except (errors.CommandFailed, errors.JobError):
                # Somebody else may have ended it meanwhile: then what they did is what counts.
                await self.job.refresh()
                if not self.job.life.concluded:
                    raise
                if ending is Ending.ABORT:
                    # Somebody else's finish is just what an abort would have done.
                    self.job.life.asked = ending
            else:
                await self._wait_for_end(ending, seconds, stall_seconds)
        return await self.conclude()

    async def _ask(self, ending: Ending, *, force: bool) -> None:
        await self.prepare(ending, force=force)
        await self.send(ending, force=force)

    async def prepare(self, ending: Ending, *, force: bool = False) -> None:
        """Do everything for an ending but ask QEMU for it: check, mark, and carry over bitmaps.

        Raises:
            NotReady: EndingAlreadyAsked: JobError: as `pivot`.
        """
        life = self.job.life
        if ending is not Ending.ABORT and life.phase is Phase.COPYING:
            raise errors.NotReady(
                f"the {self.what} of {self.disk.name} cannot {ending.value} yet:"
                " it is still copying",
                job_id=self.id,
                hint="wait for the mirroring phase",
            )
        if life.phase.over or (life.asked is not None and not force):
            raise self._already()
        # Before the mirroring phase an abort is always by force: that ends a paused job too.
        at_once = force or (ending is Ending.ABORT and life.phase is Phase.COPYING)
        if not at_once:
            await self._check_not_paused()
        await self._check_target(ending)
        await self._mark(_MARKS[ending], again=force)
        try:
            if ending is Ending.PIVOT:
                await self._carry_bitmaps()
            if ending is not Ending.ABORT and (await self.info()).speed:
                # A limit holds during the ending too, and would only prolong it.
                await self.set_bandwidth(0)
        except (errors.CommandFailed, errors.JobError):
            await self._unmark(_MARKS[ending])
            raise

    async def send(self, ending: Ending, *, force: bool = False) -> None:
        """Ask QEMU for a prepared ending, without waiting for it; raises as `prepare`."""
        life = self.job.life
        try:
            pivoting = life.asked is Ending.PIVOT
            life.ask(ending, force=force)
            if force or not life.mirrored:
                await self._cancel(pivoting=pivoting)
            else:
                await self._send(ending)
        except IllegalTransitionError:
            raise self._already() from None
        except errors.CommandFailed:
            self.job.life.refused()
            await self._unmark(_MARKS[ending])
            # A pause may have come after we looked for one: then that is the reason.
            await self.job.refresh()
            await self._check_not_paused()
            raise

    async def _check_not_paused(self) -> None:
        """A pause that lasts is a user's, or that of an I/O error: no ending could ever come."""
        if not await self.job.wait(_runs, seconds=_PAUSE_SECONDS):
            info = await self.info()
            why = "" if info.io_status == "ok" else f" by an I/O error ({info.io_status})"
            raise errors.JobError(
                f"the {self.what} of {self.disk.name} is paused{why}",
                job_id=self.id,
                hint="resume it first; an abort can be forced",
            )

    async def _cancel(self, *, pivoting: bool = False) -> None:
        await cancel_by_force(self.job, pivoting=pivoting, synchronous=self.synchronous)

    async def _send(self, ending: Ending) -> None:
        if ending is not Ending.PIVOT:
            await self.monitor.execute("block-job-cancel", {"device": self.id, "force": False})
            return
        while True:
            try:
                await self.monitor.execute("job-complete", {"id": self.id})
            except errors.CommandFailed:
                # QEMU 5.2 refuses in the short standby of a drain: it has not taken the request.
                if self.job.life.status != "standby":
                    raise
                await self._check_not_paused()
            else:
                return

    async def _wait_for_end(
        self, ending: Ending, seconds: float | None, stall_seconds: float
    ) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        first = _CONVERGE_SECONDS if seconds is None else min(_CONVERGE_SECONDS, seconds)
        if await self._wait_for_conclusion(first):
            return
        await self._converge()
        remaining = None if end is None else max(0.0, end - time.monotonic())
        if not await self._wait_for_conclusion(remaining, stall_seconds):
            raise errors.DeadlineExceeded(
                f"the {self.what} of {self.disk.name} did not {ending.value} within {seconds:g} s;"
                " the job goes on",
                hint="the guest may be writing faster than the destination takes it: let it write"
                " less, or copy with synchronous writes",
            )

    async def _wait_for_conclusion(
        self, seconds: float | None, stall_seconds: float = STALL_SECONDS
    ) -> bool:
        """Wait for the end; a group's member that is ended alone must be finalized too."""
        if Flag.GROUP in self.name.flags:
            ends = await self.job.wait(_pending, seconds=seconds, stall_seconds=stall_seconds)
            if ends and not self.job.life.concluded:
                await attempt(self.monitor, Command("job-finalize", {"id": self.id}))
        return await self.job.wait(_concluded, seconds=seconds, stall_seconds=stall_seconds)

    async def _check_target(self, ending: Ending) -> None:
        """Look at the target before an ending."""
        picture = await graph.read(self.monitor)
        node = picture.nodes.get(self.target_node)
        marks = {names.parse_bitmap(bitmap.name) for bitmap in node.bitmaps} if node else set()
        asked_by_others = marks & {(self.name.run, mark) for mark in _MARKS.values()}
        if asked_by_others and self.job.life.asked is None:
            raise self._already()
        if ending is Ending.PIVOT:
            await self._check_pivot(picture)

    async def _check_pivot(self, picture: Graph) -> None:
        """Refuse a switch that would lose data or end QEMU."""
        self.source_size = self.measure_source(picture)
        if self.disk.node in picture.nodes:
            await cautions.check_pivot(self.monitor, picture, self.disk)
        if any(user.writes for user in picture.users.get(self.name.source, ())):
            # It came after the job's filter and below it. QEMU 5.2 would abort at the switch.
            raise errors.JobError(
                f"something writes to node {self.name.source} behind the mirror, such as an export",
                job_id=self.id,
                hint="end that first",
            )

    async def _carry_bitmaps(self) -> None:
        """Give the target the bitmaps that the guest's image is to have."""

    async def _converge(self) -> None:
        """Help a job that does not come to its end, if QEMU can."""

    async def _mark(self, mark: Mark, *, again: bool) -> None:
        """Write down in QEMU what is being asked for, before it is asked for."""
        add = marks.add(self.target_node, self.name.run, mark)
        refusal = await attempt(self.monitor, add)
        if "already exists" in refusal and not again:
            raise self._already()

    async def _unmark(self, mark: Mark) -> None:
        await attempt(self.monitor, marks.remove(self.target_node, self.name.run, mark))

    def _already(self) -> errors.EndingAlreadyAsked:
        how = self.result.outcome.value if self.result is not None else "being ended"
        description = f"the {self.what} of {self.disk.name} is {how} already"
        return errors.EndingAlreadyAsked(description, job_id=self.id)

    async def conclude(self) -> Result:
        """Put the ended job away, and say what has happened; it is fine to ask twice.

        Raises:
            JobFailed: it failed.
        """
        if self.result is None:
            self.result = await conclude(self)
        return self.result


def _concluded(life: Life) -> bool:
    return life.concluded


def _pending(life: Life) -> bool:
    return life.status == "pending"


def _runs(life: Life) -> bool:
    return life.status not in PAUSED
