# SPDX-License-Identifier: MIT
"""Sizes and traffic of a disk (``query-blockstats`` and the graph)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor


@attrs.frozen
class Sizes:
    """Sizes of a disk in bytes.

    Attributes:
        capacity: what the guest sees.
        allocation: up to where the image is written (``wr_highest_offset``).
        physical: what the image takes up on its storage.
    """

    capacity: int
    allocation: int
    physical: int


@attrs.frozen
class Traffic:
    """What the guest has done with a disk since QEMU was started; times in nanoseconds."""

    rd_req: int = 0
    rd_bytes: int = 0
    wr_req: int = 0
    wr_bytes: int = 0
    errs: int = 0
    flush_operations: int = 0
    rd_total_times: int = 0
    wr_total_times: int = 0
    flush_total_times: int = 0

    @classmethod
    def parse(cls, stats: Mapping[str, Any]) -> Traffic:
        """From the ``stats`` of ``query-blockstats``."""
        return cls(
            rd_req=stats["rd_operations"],
            rd_bytes=stats["rd_bytes"],
            wr_req=stats["wr_operations"],
            wr_bytes=stats["wr_bytes"],
            errs=stats["failed_rd_operations"] + stats["failed_wr_operations"],
            flush_operations=stats["flush_operations"],
            rd_total_times=stats["rd_total_time_ns"],
            wr_total_times=stats["wr_total_time_ns"],
            flush_total_times=stats["flush_total_time_ns"],
        )

    def __add__(self, other: Traffic) -> Traffic:
        ours, theirs = attrs.asdict(self), attrs.asdict(other)
        return Traffic(**{name: ours[name] + theirs[name] for name in ours})


async def sizes(monitor: Monitor, graph: Graph, disk: Disk) -> Sizes:
    """The sizes of a disk that has a medium."""
    if disk.image is None:
        return Sizes(0, 0, 0)
    replies = await monitor.execute("query-blockstats", {"query-nodes": True})
    storage = graph.storage(disk.image.name)
    highest = (
        reply["stats"].get("wr_highest_offset", 0)
        for reply in replies
        if reply.get("node-name") == storage.name
    )
    physical = storage.actual_size or 0
    # Nothing has been written since the start: then QEMU does not know better than its size.
    return Sizes(disk.image.virtual_size, next(highest, 0) or physical, physical)


async def traffic(monitor: Monitor, disks: list[Disk]) -> list[Traffic]:
    """The traffic of each disk that a device uses; nothing for the others."""
    replies, drives = await asyncio.gather(
        monitor.execute("query-blockstats"), monitor.execute("query-block")
    )
    numbers = {
        drive.get("qdev", ""): Traffic.parse(reply["stats"])
        for drive in drives
        for reply in replies
        if _same(drive, reply)
    }
    # query-block says a device's id where it has one, else its QOM path.
    return [numbers.get(disk.device) or numbers.get(disk.qom_path) or Traffic() for disk in disks]


def _same(drive: Mapping[str, Any], reply: Mapping[str, Any]) -> bool:
    if "qdev" in drive and "qdev" in reply:
        return bool(drive["qdev"] == reply["qdev"])
    return bool(drive["device"]) and drive["device"] == reply.get("device")
