# SPDX-License-Identifier: MIT
"""A move under way: a copy of the active image, and its backing files as files beside it."""

from __future__ import annotations

import asyncio
import math
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import attrs

from qmpmirror import errors
from qmpmirror.job import STALL_SECONDS
from qmpmirror.life import Ending, Phase
from qmpmirror.operations import backing_files
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.handle import Pace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.operations.backing_files import BackingFile
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.handle import Progress


@attrs.define(eq=False, kw_only=True)
class Move(Copy):
    """A move under way: a `Copy` that ends with a pivot, or else leaves nothing behind.

    Attributes:
        chain: the backing files, top down, as they were at the start.
    """

    what: ClassVar[str] = "move"
    only_by_pivot: ClassVar[bool] = True

    chain: tuple[BackingFile, ...]

    @property
    def files(self) -> list[BackingFile]:
        """The backing files that it brings: those that were not at the new place before."""
        return backing_files.created(self.chain, self.name.base)

    async def ready(
        self, *, seconds: float | None = None, stall_seconds: float = STALL_SECONDS
    ) -> bool:
        """Copy the backing files, and wait for the mirroring phase; as `Copy.ready`.

        Cancelling this is safe: the next call goes on.

        Raises:
            JobFailed: it has failed, or a backing file cannot be copied: then it is undone.
            Stalled: ConnectionLost: as `Copy.ready`.
        """
        try:
            async with self._undone_on_failure():
                await asyncio.wait_for(self._bring_and_mirror(stall_seconds), seconds)
        except asyncio.TimeoutError:
            return False
        return await super().ready(stall_seconds=stall_seconds)

    async def _bring_and_mirror(self, stall_seconds: float) -> None:
        """Until both are done, one has failed, or the job has ended."""
        ended = asyncio.ensure_future(
            self.job.wait(lambda life: life.concluded, stall_seconds=math.inf)
        )
        works = {
            asyncio.ensure_future(self._bring()),
            asyncio.ensure_future(super().ready(stall_seconds=stall_seconds)),
        }
        try:
            waiting = set(works)
            while waiting and not ended.done():
                done, _ = await asyncio.wait({*waiting, ended}, return_when="FIRST_COMPLETED")
                for work in done & works:
                    work.result()
                waiting -= done
        finally:
            for task in (ended, *works):
                task.cancel()
            await asyncio.gather(ended, *works, return_exceptions=True)

    async def _bring(self) -> bool:
        await backing_files.bring(self.files, self.name.run)
        return True

    @asynccontextmanager
    async def _undone_on_failure(self) -> AsyncIterator[None]:
        """A file that cannot be copied or opened ends it, as an error of the mirror does."""
        try:
            yield
        except errors.DestinationError as error:
            await self.abort()
            self.result = None  # nobody has asked for this ending
            raise errors.JobFailed(
                f"the move of {self.disk.name} failed: {error.description}; the guest runs on"
                f" {self.disk.path}, which is complete",
                job_id=self.id,
                reason=error.description,
                authoritative=self.disk.path,
                removed=self.destination,
            ) from error

    async def progress(
        self, interval: float = 0.5, *, until_mirroring: bool = True
    ) -> AsyncIterator[Progress]:
        """Report as `Copy.progress`, the backing files included."""
        pace, brought = Pace(), backing_files.size(self.files)
        async for mirrored in super().progress(interval, until_mirroring=False):
            phase, there = mirrored.phase, brought
            if not all(backing_files.is_there(file, self.name.run) for file in self.files):
                there = min(brought, backing_files.done(self.files, self.name.run))
                phase = Phase.COPYING if phase is Phase.MIRRORING else phase
            offset, length = mirrored.offset + there, mirrored.length + brought
            rate, eta = pace.at(offset, length)
            yield attrs.evolve(
                mirrored, phase=phase, offset=offset, length=length, rate=rate, eta=eta
            )
            if until_mirroring and phase is not Phase.COPYING:
                return

    async def abort(
        self,
        *,
        force: bool = True,  # noqa: ARG002 - as of a copy
        seconds: float | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> Result:
        """End it at once, and remove all that it has brought; arguments and errors as `Copy.abort`.

        There is nothing to be made consistent: without a pivot nobody needs what it has copied.
        """
        return await super().abort(force=True, seconds=seconds, stall_seconds=stall_seconds)

    async def prepare(self, ending: Ending, *, force: bool = False) -> None:
        """Do everything for an ending but ask QEMU for it; before a pivot the files must be there.

        Raises:
            JobError: it cannot be finished without a pivot.
            JobFailed: a backing file cannot be copied or opened; it is undone.
            NotReady: EndingAlreadyAsked: as `pivot`.
        """
        if ending is Ending.FINISH:
            raise errors.JobError(
                f"the move of {self.disk.name} can only be ended by a pivot or an abort",
                job_id=self.id,
            )
        async with self._undone_on_failure():
            if ending is Ending.PIVOT and self.job.life.mirrored:
                await self._bring()
                await asyncio.to_thread(backing_files.publish, self.files, self.name.run)
            await super().prepare(ending, force=force)

    def tidy_files(self, *, pivoted: bool) -> None:
        """Remove what it has brought, if the guest does not need it."""
        if self.destination:  # else another process has done that, and closed its nodes
            folder = os.path.dirname(self.destination)
            backing_files.tidy(folder, self.name.run, keep=pivoted)

    async def conclude(self) -> Result:
        """Put it away, and say what has happened; as `Copy.conclude`."""
        if self.result is None:
            result = await super().conclude()
            if result.outcome is Phase.PIVOTED:
                self.result = attrs.evolve(result, notes=(*result.notes, self._unused()))
        return await super().conclude()

    def _unused(self) -> str:
        old = [f.source for f in self.chain if not backing_files.same(f.source, f.path)]
        return f"this guest does not need any more: {', '.join([self.disk.path, *old])}"
