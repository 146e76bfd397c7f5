# SPDX-License-Identifier: MIT
"""``--check-base``: a prepared image's base must hold what the source's backing holds."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import discover, disks, errors, graph

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
    tool = shutil.which("qemu-img")
    if tool is None:
        raise errors.Refused("the base cannot be checked: there is no qemu-img here")
    folder = discover.working_folder(monitor.pid)
    ours = picture.image(picture.nodes[source].child("backing"))
    theirs = picture.image(base)
    paths = [disks.path_of(picture, image.name, folder) for image in (ours, theirs)]
    process = await asyncio.create_subprocess_exec(
        *(tool, "compare", "-U", "-f", ours.driver, "-F", theirs.driver, *paths),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    words = said.decode(errors="replace").strip()
    if process.returncode == _DIFFERENT:
        raise errors.DestinationError(
            f"the base {paths[1]} does not hold what {paths[0]} holds: {words}",
            destination=paths[1],
        )
    if process.returncode:
        raise errors.Refused(f"the base {paths[1]} could not be checked: {words}")
