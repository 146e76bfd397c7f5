# SPDX-License-Identifier: MIT
"""What images take up, from the graphs that QEMUs have told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import graph, sizes
from qmpmirror.sizes import ImageSize

if TYPE_CHECKING:
    from qmpmirror.graph import Graph


@pytest.fixture
def picture(recorded: dict[str, dict[str, Any]]) -> Graph:
    replies = recorded["idle"]
    return graph.parse(
        replies["query-block"],
        replies["query-named-block-nodes"],
        replies["x-debug-query-block-graph"],
    )


def stored(picture: Graph, *images: str) -> int:
    found = [picture.storage(image).actual_size for image in images]
    return sum(size for size in found if size is not None)


def test_one_image(picture: Graph) -> None:
    virtual = picture.nodes["top"].virtual_size
    assert sizes.of_image(picture, "top") == ImageSize(virtual, stored(picture, "top"))


def test_a_chain(picture: Graph) -> None:
    chain = [image.name for image in picture.chain("top")]
    assert len(chain) == 3
    found = sizes.of_chain(picture, "top")
    assert found == ImageSize(picture.nodes["top"].virtual_size, stored(picture, *chain))
    assert found != sizes.of_image(picture, "top")


def test_a_data_file_counts(picture: Graph) -> None:
    (image,) = [node for node in picture.nodes.values() if node.child("data-file")]
    data = picture.nodes[image.child("data-file")]
    assert data.actual_size
    found = sizes.of_image(picture, image.name)
    assert found is not None
    assert found.allocated == stored(picture, image.name) + data.actual_size


@pytest.mark.parametrize("size", [sizes.of_image, sizes.of_chain])
def test_a_node_that_is_gone(picture: Graph, size: Any) -> None:
    assert size(picture, "gone") is None


@pytest.mark.parametrize(
    "change", [{"driver": "host_device", "actual_size": 0}, {"driver": "nbd", "actual_size": None}]
)
def test_what_qemu_cannot_tell(picture: Graph, change: dict[str, Any]) -> None:
    """It says of a device that it takes up nothing, and nothing at all of an export."""
    storage = attrs.evolve(picture.storage("base"), **change)
    changed = attrs.evolve(picture, nodes={**picture.nodes, storage.name: storage})
    virtual = picture.nodes["base"].virtual_size
    assert sizes.of_image(changed, "base") == ImageSize(virtual, None)
    assert sizes.of_chain(changed, "top") == ImageSize(picture.nodes["top"].virtual_size, None)
    assert sizes.of_image(changed, "top") == sizes.of_image(picture, "top")
