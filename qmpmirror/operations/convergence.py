# SPDX-License-Identifier: MIT
"""Getting both images equal although the guest writes: its writes are made to wait for the copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpmirror import errors, graph
from qmpmirror.names import Flag
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from qmpmirror.operations.copy import Copy


async def make_synchronous(copy: Copy) -> None:
    """Switch a running copy to synchronous writes; see `Copy.make_synchronous`."""
    if not copy.schema.has_command("block-job-change"):
        raise errors.Unsupported(
            "this QEMU cannot switch a running copy to synchronous writes",
            command="block-job-change",
            hint="QEMU 8.2 and newer can; others when the copy is started",
        )
    if not await _is_safe(copy):
        raise errors.Refused(
            "the copy has no backing file yet: synchronous writes would corrupt it",
            hint="copy with synchronous writes from the start",
        )
    copy.synchronous = True
    await copy.monitor.execute("block-job-change", _write_blocking(copy))


async def converge(copy: Copy) -> None:
    """Help a mirror that does not come to its end, where QEMU can (8.2) and where it is safe."""
    can = copy.schema.has_command("block-job-change") and copy.job.life.mirrored
    if can and await _is_safe(copy):
        await attempt(copy.monitor, Command("block-job-change", _write_blocking(copy)))


async def _is_safe(copy: Copy) -> bool:
    """Whether the target has its backing: without it, synchronous writes would corrupt it."""
    if Flag.SHALLOW not in copy.name.flags:
        return True
    node = (await graph.read(copy.monitor)).nodes.get(copy.target_node)
    return node is not None and node.child("backing") != ""


def _write_blocking(copy: Copy) -> dict[str, Any]:
    return {"id": copy.id, "type": "mirror", "copy-mode": "write-blocking"}
