# SPDX-License-Identifier: MIT
"""A job of one phase under way: a pull, or the commit of inner images. It ends by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from qmpmirror import discover, disks, errors, graph, sizes
from qmpmirror.job import STALL_SECONDS
from qmpmirror.life import CANCELLED, Phase
from qmpmirror.names import Flag, Mark
from qmpmirror.operations import bitmaps, marks
from qmpmirror.operations.conclusion import Result, delete_nodes, left_of
from qmpmirror.operations.handle import BlockJob
from qmpmirror.steps import Command, attempt, remove_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Graph, Node
    from qmpmirror.life import Life
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName


@attrs.define(eq=False, kw_only=True)
class OnePhaseJob(BlockJob):
    """A job that ends by itself: a `BlockJob` whose ``disk`` is as it was at the start.

    Attributes:
        what: what it is, for messages.
        name: the job's id, taken apart.
        destination: where the data goes.
        files: the files that are to be removed when it has been successful.
        result: how it has ended; None while it goes on, and when it failed.
    """

    what: ClassVar[str] = "job"

    name: JobName
    destination: str
    files: Sequence[str] = ()
    result: Result | None = attrs.field(default=None, init=False)

    async def end(
        self, *, seconds: float | None = None, stall_seconds: float = STALL_SECONDS
    ) -> Result | None:
        """Wait for the end, and close the images that are not needed any more.

        Cancelling this is safe; the job goes on, and `recover` puts it away.

        Args:
            seconds: return None after this long; the job goes on.
            stall_seconds: give up after this long without any progress.

        Raises:
            JobFailed: it failed.
            Stalled: no progress; the job goes on.
            ConnectionLost: the connection ended.
        """
        merges = Flag.BITMAPS in self.name.flags
        until = _is_pending if merges else _is_concluded
        if not await self.job.wait(until, seconds=seconds, stall_seconds=stall_seconds):
            return None
        if merges and not self.job.life.concluded:
            await self._merge_bitmaps()
            await attempt(self.monitor, Command("job-finalize", {"id": self.id}))
            await self.job.wait(_is_concluded, stall_seconds=stall_seconds)
        return await self.conclude()

    async def abort(self, *, stall_seconds: float = STALL_SECONDS) -> Result:
        """Give it up (``block-job-cancel``); the guest's data is whole, whatever was done by then.

        Raises:
            JobFailed: it failed before.
            ConnectionLost: the connection ended.
        """
        if not self.job.life.concluded:
            await attempt(self.monitor, self._cancel())
            await self.job.wait(_is_concluded, stall_seconds=stall_seconds)
        return await self.conclude()

    async def request_abort(self) -> None:
        """Ask to give it up and do not wait; `recover` puts it away."""
        await attempt(self.monitor, self._cancel())

    async def conclude(self) -> Result:
        """Put the ended job away, and say what has happened; it is fine to ask twice.

        Raises:
            JobFailed: it failed.
        """
        if self.result is None:
            self.result = await self._put_away()
        return self.result

    def _cancel(self) -> Command:
        return Command("block-job-cancel", {"device": self.id, "force": True})

    def images(self, picture: Graph) -> Sequence[Node]:
        """The images whose bitmaps go with the data, top down."""
        raise NotImplementedError

    async def _merge_bitmaps(self) -> None:
        """Before the images are taken out of the chain; nothing writes to them meanwhile."""
        picture = await graph.read(self.monitor)
        target = picture.nodes[self.name.target_node]
        await bitmaps.merge(self.monitor, target, self.images(picture))

    async def _put_away(self) -> Result:
        ended = await self.job.refresh()
        error = ended.error if ended else self.job.error
        self.job.close()
        aborted = self.job.life.cancelled or error == CANCELLED
        failed = bool(error) and not aborted
        done = not (aborted or failed)
        refused: dict[str, str] = {}
        if done:
            refused = await put_away(self.monitor, self.name)
        else:
            await self.job.dismiss()
        picture = await graph.read(self.monitor)
        left = left_of(picture, refused)
        where = await self._active(picture)
        self.job.life.phase = Phase.FAILED if failed else Phase.FINISHED if done else Phase.ABORTED
        if failed:
            raise errors.JobFailed(
                f"the {self.what} of {self.disk.name} failed: {error}; the guest runs on {where},"
                " which is complete",
                job_id=self.id,
                reason=error,
                authoritative=where,
            )
        deletes = done and not left
        return Result(
            outcome=self.job.life.phase,
            disk=self.disk.name,
            source=self.disk.path,
            destination=self.destination,
            active=where,
            consistent=done,
            deleted=tuple(path for path in self.files if deletes and remove_file(path)),
            left=tuple(left),
            destination_size=sizes.of_image(picture, self.name.target_node),
        )

    async def _active(self, picture: Graph) -> str:
        folder = discover.working_folder(self.monitor.pid)
        for disk in await disks.read(self.monitor, picture, folder):
            if disk.is_under(self.disk):
                return disk.path
        return self.disk.path


async def put_away(monitor: Monitor, name: JobName) -> dict[str, str]:
    """Dismiss a job that has done its work, and close what it has taken out of the chain.

    Until it is dismissed it holds these nodes, and some QEMUs crash when the graph is read. When it
    is, nothing else knows them, so they are marked before.

    Returns:
        What QEMU said of nodes that it did not close.
    """
    for node in name.replaced:
        await attempt(monitor, marks.add(node, name.run, Mark.REPLACED))
    await attempt(monitor, Command("job-dismiss", {"id": str(name)}))
    return await delete_nodes(monitor, name.replaced)


def _is_pending(life: Life) -> bool:
    return life.status == "pending"


def _is_concluded(life: Life) -> bool:
    return life.concluded
