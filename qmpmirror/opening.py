# SPDX-License-Identifier: MIT
"""The step that opens a node and makes sure that it is what the copy needs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors, graph
from qmpmirror.steps import Command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.graph import Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.undo import Undo

_RETRY_SECONDS: Final = 0.5
_NOT_WRITABLE: Final = "Could not open image: Permission denied"
"""All that QEMU 10.2 and newer say of an NBD export that is read-only."""


@attrs.frozen
class OpenImage:
    """``blockdev-add``, with checks that only an open node allows.

    Attributes:
        options: the node's options.
        size: the virtual size in bytes that it must have; 0 for any.
        storage: the node below a raw one whose size was not made by us: a larger one gets a window
            of exactly ``size``, because QEMU mirrors only between equal sizes.
        needs_backing: whether its header must name a backing file.
        backing_size: the virtual size that this must have, in bytes; 0 for any.
        destination: for messages.
        seconds: how long to wait for a server that is not up yet.
    """

    options: Mapping[str, Any]
    size: int = 0
    storage: str = ""
    needs_backing: bool = False
    backing_size: int = 0
    destination: str = ""
    seconds: float = 0.0

    def commands(self) -> list[Command]:
        """What will be sent, in order."""
        return [Command("blockdev-add", self.options)]

    async def run(self, monitor: Monitor, undo: Undo) -> None:
        """Open it.

        Raises:
            DestinationError: it is not what the copy needs.
            CommandFailed: QEMU cannot open it.
        """
        options = dict(self.options)
        if self.storage and options["driver"] == "raw":
            options |= await self._window(monitor)
        name = options["node-name"]
        undo.command(monitor, Command("blockdev-del", {"node-name": name}))
        await self._add(monitor, options)
        if self.size or self.needs_backing:
            picture = await graph.read(monitor)
            self._check(picture.nodes[name], picture)

    async def _add(self, monitor: Monitor, options: Mapping[str, Any]) -> None:
        end = time.monotonic() + self.seconds
        while True:
            try:
                await monitor.execute("blockdev-add", options)
            except errors.CommandFailed as error:
                if options["driver"] == "nbd" and error.reason == _NOT_WRITABLE:
                    raise self._refused(f"is read-only, it seems: {error.reason}") from error
                absent = "Connection refused" in error.reason or "No such file" in error.reason
                if not absent or time.monotonic() + _RETRY_SECONDS > end:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return

    async def _window(self, monitor: Monitor) -> dict[str, int]:
        node = (await graph.read(monitor)).nodes[self.storage]
        if node.virtual_size < self.size:
            raise self._refused(
                f"has {node.virtual_size} bytes: too small for a disk of {self.size} bytes"
            )
        return {"size": self.size} if node.virtual_size > self.size else {}

    def _check(self, node: Node, picture: graph.Graph) -> None:
        if self.size and node.virtual_size != self.size:
            raise self._refused(
                f"has a virtual size of {node.virtual_size} bytes, the disk {self.size} bytes:"
                " they must be equal"
            )
        if node.read_only:
            raise self._refused("can only be read")
        if not self.needs_backing:
            return
        if not node.backing_filename:
            raise self._refused("has no backing file, which a shallow copy needs")
        opened = node.child("backing")
        if opened and picture.nodes[opened].virtual_size != self.backing_size:
            raise self._refused(
                f"has a backing file of {picture.nodes[opened].virtual_size} bytes, the disk one of"
                f" {self.backing_size} bytes: it cannot be the same"
            )

    def _refused(self, why: str) -> errors.DestinationError:
        return errors.DestinationError(f"{self.destination} {why}", destination=self.destination)
