# SPDX-License-Identifier: MIT
"""blockpull: read what lies below the active image into it, which makes the chain shorter.

It has one phase. What was pulled stays when it is given up, and is not pulled again the next time.

Rests on ``block-stream``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from qmpmirror import discover, disks, errors, graph, names
from qmpmirror.job import Job
from qmpmirror.names import Flag, JobName
from qmpmirror.operations import bitmaps, layers
from qmpmirror.operations.onephase import OnePhaseJob
from qmpmirror.operations.options import valid_bandwidth
from qmpmirror.operations.starting import start_job, taken_back_on_error
from qmpmirror.steps import Command

if TYPE_CHECKING:
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema


@attrs.define(eq=False, kw_only=True)
class Pull(OnePhaseJob):
    """A pull under way."""

    what: ClassVar[str] = "pull"

    def images(self, picture: Graph) -> list[Node]:
        """The active image and those that are pulled into it."""
        chain = picture.chain(self.name.source)
        known = [image.name for image in chain]
        return chain[: known.index(self.name.base)] if self.name.base in known else chain


async def start(
    monitor: Monitor,
    schema: Schema,
    disk_name: str,
    *,
    base: str = "",
    bandwidth: int = 0,
    keep_relative: bool = False,
) -> Pull:
    """Check everything, then start the job; see `Machine.blockpull`."""
    valid_bandwidth(None, None, bandwidth)
    folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, folder), disk_name)
    active = layers.active_image(picture, disk, disk_name)
    chain = picture.chain(disk.node)
    place = layers.find(picture, chain, base, disk, folder) if base else len(chain)
    if not place:
        raise errors.Refused(f"base {base!r} is the active image of {disk.name!r}: pull into what?")
    pulled = chain[1:place]
    flags = {Flag.BITMAPS} if any(map(bitmaps.carried, pulled)) else set()
    replaced = tuple(graph.named_nodes(picture, pulled))
    stays = chain[place].name if base else ""
    name = JobName("pull", names.new_run(), frozenset(flags), active.name, replaced, stays)
    arguments: dict[str, Any] = {
        "job-id": str(name),
        "device": active.name,
        "auto-finalize": not flags,
        "auto-dismiss": False,
    }
    if base:
        arguments |= {
            "base-node": stays,
            "backing-file": layers.header_name(
                picture, chain[place], active, folder, relative=keep_relative
            ),
        }
    if bandwidth:
        arguments["speed"] = bandwidth
    schema.check("block-stream", arguments)
    job = Job(monitor, str(name))
    async with taken_back_on_error(job) as undo:
        await start_job(job, Command("block-stream", arguments), undo, stops=None)
        await job.refresh()
    return Pull(
        monitor=monitor, schema=schema, job=job, disk=disk, name=name, destination=disk.path
    )
