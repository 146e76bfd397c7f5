# SPDX-License-Identifier: MIT
"""What makes certain QEMUs hang for ever, with the guest: refused before it can happen.

No schema shows these bugs, so the version decides here, on caution.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qmpmirror import errors

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor

_VDI_WORKS: Final = (6, 0)
_REPLACES_WITH_IOTHREAD: Final = (9, 0)


async def check(
    monitor: Monitor, picture: Graph, disk: Disk, new_format: str, *, pivots: bool
) -> None:
    """Refuse a copy that QEMU would hang in.

    Raises:
        Refused: to vdi before QEMU 6.0, whose lock may never be granted; or as `check_pivot`.
    """
    if new_format == "vdi" and await _version(monitor) < _VDI_WORKS:
        raise errors.Refused("copying to vdi can hang this QEMU; 6.0 and newer do not")
    if pivots:
        await check_pivot(monitor, picture, disk)


async def check_pivot(monitor: Monitor, picture: Graph, disk: Disk) -> None:
    """Refuse a pivot that QEMU would hang in.

    Raises:
        Refused: below a throttle filter on a disk with an iothread, before QEMU 9.0: it takes the
            iothread's lock twice.
    """
    filters = {picture.nodes[name].driver for name in picture.stack(disk.node)}
    if "throttle" not in filters or await _version(monitor) >= _REPLACES_WITH_IOTHREAD:
        return
    if await _has_iothread(monitor, disk.qom_path):
        raise errors.Refused(
            f"a pivot of {disk.name}, which has an iothread and a throttle filter, would hang this"
            " QEMU for ever",
            hint="finish works; so does a pivot without one of both, or with QEMU 9.0 and newer",
        )


async def _version(monitor: Monitor) -> tuple[int, int]:
    version = (await monitor.execute("query-version"))["qemu"]
    return version["major"], version["minor"]


async def _has_iothread(monitor: Monitor, device: str) -> bool:
    """Whether a device, or the controller whose bus it is on, runs in an iothread."""
    bus = await _get(monitor, device, "parent_bus")
    return any(
        [await _get(monitor, path, "iothread") for path in (device, os.path.dirname(bus)) if path]
    )


async def _get(monitor: Monitor, path: str, name: str) -> str:
    if not path:
        return ""
    try:
        return str(await monitor.execute("qom-get", {"path": path, "property": name}))
    except errors.CommandFailed:
        return ""
