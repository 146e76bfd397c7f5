# SPDX-License-Identifier: MIT
"""A copy under way: a job of two phases whose target is ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from qmpmirror import errors, graph, names, sizes
from qmpmirror.names import Flag
from qmpmirror.operations import bitmaps, convergence
from qmpmirror.operations.chain import attach_own_chain
from qmpmirror.operations.twophase import TwoPhaseJob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Graph
    from qmpmirror.sizes import ImageSize

_ROLES = ("format", "base", "data", "storage")


@attrs.define(eq=False, kw_only=True)
class Copy(TwoPhaseJob):
    """A copy under way: a `TwoPhaseJob` whose ``disk`` is the source as it was at the start.

    Attributes:
        backing: the node that both images share; empty when there is none, or the copy has a chain
            of its own.
    """

    what: ClassVar[str] = "copy"

    backing: str

    @property
    def own_nodes(self) -> Sequence[str]:
        """The nodes of the copy, top down."""
        return [names.node_name(self.name.run, role) for role in _ROLES]

    def measure_source(self, picture: Graph) -> ImageSize | None:
        """The size of the top image if shallow, else of the whole chain."""
        of = sizes.of_image if Flag.SHALLOW in self.name.flags else sizes.of_chain
        return of(picture, self.name.source)

    async def make_synchronous(self) -> None:
        """Let each write of the guest wait for both images from now on (``block-job-change``).

        Raises:
            Unsupported: QEMU before 8.2.
            Refused: the target has no backing file yet: it would be corrupted.
        """
        await convergence.make_synchronous(self)

    async def _check_pivot(self, picture: Graph) -> None:
        """Refuse a switch that would lose data; give a late chain to the target."""
        await super()._check_pivot(picture)
        node = picture.nodes.get(self.target_node)
        if Flag.LATE_CHAIN in self.name.flags:
            node = await attach_own_chain(self.monitor, picture, self.name)
        if Flag.SHALLOW not in self.name.flags or Flag.DRIVE_MIRROR in self.name.flags:
            return  # drive-mirror attaches the backing itself, when it completes
        have = node.child("backing") if node else ""
        if not have or (self.backing and have != self.backing):
            raise errors.JobError(
                f"the copy of {self.disk.name} lacks its backing node {self.backing}:"
                " switching to it would lose data",
                job_id=self.id,
            )

    async def _carry_bitmaps(self) -> None:
        picture = await graph.read(self.monitor)
        self.notes += await bitmaps.carry(self.monitor, picture, self.name)

    async def _converge(self) -> None:
        await convergence.converge(self)
