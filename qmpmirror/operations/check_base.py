# SPDX-License-Identifier: MIT
"""``--check-base``: a prepared image's base must hold what the source's backing holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import discover, disks, errors, graph
from qmpmirror.operations import programs

if TYPE_CHECKING:
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.steps import Command
    from qmpmirror.undo import Undo

_DIFFERENT: Final = 1


@attrs.frozen
class CheckBase:
    """The step that compares, for a target whose chain is open from the start.

    Attributes:
        source: the node whose backing it must equal.
        target: the node whose backing is looked at.
    """

    source: str
    target: str

    def commands(self) -> list[Command]:
        """Nothing is sent that changes anything."""
        return []

    async def run(self, monitor: Monitor, undo: Undo) -> None:  # noqa: ARG002 - Step
        """Compare; raises as `compare`."""
        picture = await graph.read(monitor)
        await compare(monitor, picture, self.source, picture.nodes[self.target].child("backing"))


async def compare(monitor: Monitor, picture: Graph, source: str, base: str) -> None:
    """Compare the backing of ``source`` with the image ``base``, by ``qemu-img compare``.

    Both are read to their ends; cancelling this ends the comparison.

    Raises:
        DestinationError: they differ.
        Refused: they cannot be compared.
    """
    tool = programs.qemu_img("the base cannot be checked")
    folder = discover.working_folder(monitor.pid)
    ours = picture.image(picture.nodes[source].child("backing"))
    theirs = picture.image(base)
    paths = [disks.path_of(picture, image.name, folder) for image in (ours, theirs)]
    formats = ["-f", ours.driver, "-F", theirs.driver]
    code, words = await programs.run(tool, "compare", "-U", *formats, *paths)
    if code == _DIFFERENT:
        raise errors.DestinationError(
            f"the base {paths[1]} does not hold what {paths[0]} holds: {words}",
            destination=paths[1],
        )
    if code:
        raise errors.Refused(f"the base {paths[1]} could not be checked: {words}")
