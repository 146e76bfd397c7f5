# SPDX-License-Identifier: MIT
"""Backing chains drawn as a tree, with a running copy beside its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpmirror import names
from qmpmirror.cli.render import human_size
from qmpmirror.names import Mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node


def draw(graph: Graph, disks: Sequence[Disk]) -> str:
    """One tree for each base image: what stands on it below it, and who uses it beside it."""
    above = _images_above(graph, disks)
    users = {disk.image.name: _user(disk) for disk in disks if disk.image is not None}
    in_use = {image.name for disk in disks if disk.image for image in graph.chain(disk.node)}
    for target in _targets(graph):
        if target in in_use and not _is_written(graph, target):
            continue  # a copy or an overlay of ours that the guest runs on by now
        users.setdefault(target, _purpose(graph.nodes[target], is_base=target in in_use))
    lines: list[str] = []
    for base in (name for name in above if not _backing(graph, name)):
        lines += _branch(graph, base, above, users, "", "")
    return "\n".join(lines)


def _purpose(target: Node, *, is_base: bool) -> str:
    marks = {names.parse_bitmap(bitmap.name) for bitmap in target.bitmaps}
    if Mark.KEPT in {mark for _, mark in filter(None, marks)}:
        return "kept"
    return "commit under way" if is_base else "copy under way"


def _user(disk: Disk) -> str:
    return f"{disk.name} (guest)" if disk.qom_path else disk.name


def _images_above(graph: Graph, disks: Sequence[Disk]) -> dict[str, list[str]]:
    """For each image the images that have it as backing."""
    tops = [disk.image.name for disk in disks if disk.image is not None]
    above: dict[str, list[str]] = {}
    for top in [*tops, *_targets(graph)]:
        below = ""
        for image in graph.chain(top):
            above.setdefault(image.name, [])
            if below and below not in above[image.name]:
                above[image.name].append(below)
            below = image.name
    return above


def _targets(graph: Graph) -> Iterator[str]:
    """The nodes that a copy of ours, or anybody else's mirror, writes to."""
    for name in graph.nodes:
        ours = names.parse_node(name)
        if _is_written(graph, name) or (ours is not None and ours[1] == "format"):
            yield name


def _is_written(graph: Graph, name: str) -> bool:
    """Whether a job writes to it."""
    return any(user.role == "target" for user in graph.users.get(name, ()))


def _backing(graph: Graph, name: str) -> str:
    return graph.nodes[name].child("backing")


def _branch(  # noqa: PLR0917 - a recursion and what it draws
    graph: Graph,
    name: str,
    above: dict[str, list[str]],
    users: dict[str, str],
    first: str,
    rest: str,
) -> Iterable[str]:
    node, storage = graph.nodes[name], graph.storage(name)
    sizes = human_size(node.virtual_size)
    if storage.actual_size is not None:
        sizes += f", {human_size(storage.actual_size)} allocated"
    user = f"  <- {users[name]}" if name in users else ""
    yield f"{first}{graph.location(name)} [{node.driver}, {sizes}]{user}"
    branches = above[name]
    for branch in branches:
        last = branch is branches[-1]
        yield from _branch(
            graph,
            branch,
            above,
            users,
            rest + ("└─ " if last else "├─ "),
            rest + ("   " if last else "│  "),
        )
