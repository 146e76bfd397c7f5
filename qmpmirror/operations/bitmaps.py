# SPDX-License-Identifier: MIT
"""Dirty bitmaps that go with the data, just before the guest or its chain gets another image.

The target's bitmaps are created while the mirror still writes every change of the guest to both
images, so that nothing is missed; at worst a little more is marked as dirty than was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpmirror import names
from qmpmirror.names import Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Bitmap, Graph, Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName

_STORES_BITMAPS = "qcow2"


async def carry(monitor: Monitor, picture: Graph, name: JobName) -> list[str]:
    """Give the target the bitmaps of the source, in one ``transaction``; it can be repeated.

    A shallow copy takes those of the top image; a full one those of the whole chain, as far down as
    each goes without a gap.

    Returns:
        What somebody who relies on bitmaps must know.
    """
    source = picture.nodes.get(name.source)
    target = picture.nodes.get(name.target_node)
    if source is None or target is None:
        return []
    images = [source] if Flag.SHALLOW in name.flags else picture.chain(source.name)
    await merge(monitor, target, images)
    return losses(source, target.driver)


async def merge(monitor: Monitor, target: Node, images: Sequence[Node]) -> None:
    """Give a node the bitmaps of images, in one ``transaction``; it can be repeated.

    Args:
        monitor: the QEMU.
        target: the node; it may be the first of the images.
        images: top down. The top one says which bitmaps there are; the others contribute to each as
            far down as it goes without a gap.
    """
    known = {bitmap.name for bitmap in target.bitmaps}
    actions: list[dict[str, Any]] = []
    for bitmap in carried(images[0]):
        sources = [layer for layer in _layers(images, bitmap.name) if layer.name != target.name]
        if bitmap.name not in known:
            stored = target.driver == _STORES_BITMAPS
            actions.append(add_action(target.name, bitmap, stored=stored))
        if sources:
            actions.append(_merge(target, bitmap, sources))
    if actions:
        await monitor.execute("transaction", {"actions": actions})


def carried(source: Node) -> list[Bitmap]:
    """The bitmaps of an image that are anybody's and can be used."""
    return [
        bitmap
        for bitmap in source.bitmaps
        if bitmap.name and not bitmap.inconsistent and names.parse_bitmap(bitmap.name) is None
    ]


def losses(source: Node, new_format: str) -> list[str]:
    """What a copy in a format cannot keep of the source's bitmaps, in sentences."""
    notes = [
        f"bitmap {bitmap.name} is inconsistent, since a crash: it is not carried over"
        for bitmap in source.bitmaps
        if bitmap.inconsistent
    ]
    if new_format != _STORES_BITMAPS:
        notes += [
            f"bitmap {bitmap.name} will be lost when QEMU ends: {new_format} cannot store it"
            for bitmap in carried(source)
            if bitmap.persistent
        ]
    return notes


def _layers(images: Sequence[Node], name: str) -> list[Node]:
    """The images from the top one down that have the bitmap, without a gap."""
    found = []
    for image in images:
        if not any(bitmap.name == name for bitmap in carried(image)):
            break
        found.append(image)
    return found


def add_action(node: str, bitmap: Bitmap, *, stored: bool = True) -> dict[str, Any]:
    """The action of a ``transaction`` that gives a node an empty bitmap like another one.

    Args:
        node: the node.
        bitmap: the other one.
        stored: whether the node's format can store bitmaps.
    """
    data = {
        "node": node,
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "persistent": bitmap.persistent and stored,
        "disabled": not bitmap.recording,
    }
    return {"type": "block-dirty-bitmap-add", "data": data}


def _merge(target: Node, bitmap: Bitmap, layers: Sequence[Node]) -> dict[str, Any]:
    data = {
        "node": target.name,
        "target": bitmap.name,
        "bitmaps": [{"node": layer.name, "name": bitmap.name} for layer in layers],
    }
    return {"type": "block-dirty-bitmap-merge", "data": data}
