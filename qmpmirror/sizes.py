# SPDX-License-Identifier: MIT
"""How large an image is to a guest, and what it takes up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpmirror.graph import Graph

_DEVICES: Final = frozenset({"host_device", "host_cdrom"})
"""QEMU says of these that they take up nothing."""


@attrs.frozen
class ImageSize:
    """The size of an image, in bytes.

    Attributes:
        virtual: what a guest sees.
        allocated: what it takes up on its storage; None when QEMU cannot tell, as of a block
            device or an NBD export.
    """

    virtual: int
    allocated: int | None


def of_image(picture: Graph, image: str) -> ImageSize | None:
    """The size of one image without those below it; None when its node is gone."""
    return _size(picture, [image]) if image in picture.nodes else None


def of_chain(picture: Graph, image: str) -> ImageSize | None:
    """The size of an image together with its backing chain; None when its node is gone."""
    if image not in picture.nodes:
        return None
    return _size(picture, [below.name for below in picture.chain(image)])


def _size(picture: Graph, images: list[str]) -> ImageSize:
    return ImageSize(picture.nodes[images[0]].virtual_size, _allocated(picture, images))


def _allocated(picture: Graph, images: Iterable[str]) -> int | None:
    total = 0
    for image in images:
        for name in picture.image_nodes(image):
            node = picture.nodes[name]
            if node.child("file") or node.child("image"):
                continue
            if node.actual_size is None or node.driver in _DEVICES:
                return None
            total += node.actual_size
    return total
