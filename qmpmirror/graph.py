# SPDX-License-Identifier: MIT
"""QEMU's block graph, read once into frozen classes: nodes, their chains, and who uses them.

Rests on ``query-block``, ``query-named-block-nodes`` and ``x-debug-query-block-graph``; where the
last one is missing, on the ``children`` that nodes have since QEMU 10.1.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors, names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qmpmirror.monitor import Monitor

FILTERS: Final = frozenset(
    {
        "backup-top",
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "preallocate",
        "throttle",
    }
)
"""Drivers whose node shows the same data as its child. ``raw`` is a format, not a filter."""

JOB_FILTERS: Final = frozenset({"mirror_top", "commit_top", "backup-top"})
"""Filters that belong to a job and go away with it."""

_CRASH_WHEN_CONCLUDED: Final = {"backup": range(6), "stream": range(6, 10)}
"""By type of job the major versions that crash when their nodes are looked at.

5.2 does with a concluded backup and 7.2 with a concluded stream; 5.2, 10.0 and 11.1 do not with the
latter. Of those between nobody has tried, so they are taken for fragile.
"""

_OF_AN_IMAGE: Final = frozenset({"file", "data-file", "image"})

PATH_DRIVERS: Final = frozenset({"file", "host_device", "host_cdrom"})
"""Protocol drivers whose ``filename`` is a path."""


@attrs.frozen
class Bitmap:
    """A dirty bitmap of a node; QEMU's own have no name."""

    name: str
    granularity: int
    count: int
    persistent: bool
    recording: bool
    inconsistent: bool


@attrs.frozen
class Node:
    """A block node.

    Attributes:
        name: its node name; QEMU makes up one that starts with ``#``.
        driver: such as ``qcow2`` or ``file``.
        filename: its image as QEMU names it: a path, a URL or ``json:{...}``.
        read_only: whether it is open for reading only.
        virtual_size: what the guest sees, in bytes.
        actual_size: what it takes up, in bytes; None when QEMU does not know.
        cluster_size: in bytes; 0 when the format has no clusters.
        extended_l2: whether a qcow2 image has subclusters.
        cache_direct: whether the host's page cache is bypassed.
        cache_no_flush: whether flushes are ignored.
        detect_zeroes: ``off``, ``on`` or ``unmap``.
        bitmaps: its dirty bitmaps.
        backing_filename: what its header says of a backing file, made absolute by QEMU.
        backing_format: and of that one's format.
        encrypted: whether its content is.
        children: child nodes as (role, node name), such as ``("backing", "snap1")``.
    """

    name: str
    driver: str
    filename: str
    read_only: bool
    virtual_size: int
    actual_size: int | None
    cluster_size: int
    extended_l2: bool
    cache_direct: bool
    cache_no_flush: bool
    detect_zeroes: str
    bitmaps: tuple[Bitmap, ...]
    backing_filename: str = ""
    backing_format: str = ""
    encrypted: bool = False
    children: tuple[tuple[str, str], ...] = ()

    @property
    def is_filter(self) -> bool:
        """Whether it shows the same data as its child."""
        return self.driver in FILTERS

    @property
    def named_by_user(self) -> bool:
        """Whether the name is a user's choice, and so the node can be the monitor's."""
        return not self.name.startswith("#")

    def child(self, role: str) -> str:
        """The name of the child in a role, or an empty string."""
        return next((name for edge, name in self.children if edge == role), "")


@attrs.frozen
class User:
    """Something that is no node and uses one: a device's backend, an export, or a job.

    Attributes:
        kind: ``block-backend`` or ``block-job``.
        name: the backend's or the device's name, the job's id, or nothing (an export).
        role: such as ``root``, ``target`` or ``main node``.
        writes: whether it may write.
    """

    kind: str
    name: str
    role: str
    writes: bool = False


@attrs.frozen
class Graph:
    """All nodes of a QEMU at one moment.

    Attributes:
        nodes: by name.
        users: for each node what uses it from outside the graph; incomplete on a QEMU without
            ``x-debug-query-block-graph``.
        drives: the reply of ``query-block``.
    """

    nodes: Mapping[str, Node]
    users: Mapping[str, tuple[User, ...]]
    drives: tuple[Mapping[str, Any], ...]

    def parents(self, name: str) -> list[Node]:
        """The nodes that have this one as a child."""
        return [node for node in self.nodes.values() if name in (c for _, c in node.children)]

    def below(self, name: str) -> str:
        """The child that a filter filters."""
        node = self.nodes[name]
        # blkdebug calls its child "image".
        return node.child("file") or node.child("backing") or node.child("image")

    def image(self, name: str) -> Node:
        """The first node at or below ``name`` that is no filter."""
        node = self.nodes[name]
        while node.is_filter:
            node = self.nodes[self.below(node.name)]
        return node

    def stack(self, root: str) -> list[str]:
        """The nodes from ``root`` down to its image node, both included."""
        names = [root]
        while self.nodes[names[-1]].is_filter:
            names.append(self.below(names[-1]))
        return names

    def chain(self, root: str) -> list[Node]:
        """The images of a backing chain, the active one first, without filters."""
        images = [self.image(root)]
        while backing := images[-1].child("backing"):
            images.append(self.image(backing))
        return images

    def storage(self, image: str) -> Node:
        """The protocol node at the bottom of an image, below its format and slice."""
        node = self.nodes[image]
        while child := node.child("file") or node.child("image"):
            node = self.nodes[child]
        return node

    def image_nodes(self, image: str) -> list[str]:
        """The nodes of one image from format to storage, filters and data file included."""
        names = [image]
        for name in names:
            node = self.nodes[name]
            names.extend(child for role, child in node.children if role in _OF_AN_IMAGE)
        return names

    def replaced_by_pivot(self, source: str, *, whole_chain: bool) -> list[str]:
        """The nodes that nobody needs once ``source`` is replaced, top down: format before storage.

        Nodes that QEMU has named itself are left out: they go with the node above them.
        """
        if source not in self.nodes:
            return []
        images = self.chain(source) if whole_chain else [self.nodes[source]]
        return named_nodes(self, images)

    def path(self, image: str) -> str:
        """The path of an image as QEMU opened it; empty when it is no file or device."""
        storage = self.storage(image)
        return _plain_path(storage.filename) if storage.driver in PATH_DRIVERS else ""

    def location(self, image: str) -> str:
        """Where an image is, for people: its path, else how QEMU names it."""
        return self.path(image) or self.nodes[image].filename

    def jobs_on(self, names: Iterable[str]) -> list[str]:
        """Ids of the jobs that use any of these nodes, directly or through a filter of theirs."""
        found: list[str] = []
        for name in names:
            users = list(self.users.get(name, ()))
            for parent in self.parents(name):
                if parent.driver in JOB_FILTERS:
                    users.extend(self.users.get(parent.name, ()))
            found.extend(user.name for user in users if user.kind == "block-job")
        return list(dict.fromkeys(found))

    def is_used(self, root: str) -> bool:
        """Whether a device or an export uses a root node on which no job runs."""
        return any(user.kind == "block-backend" for user in self.users.get(root, ()))

    def is_root(self, name: str) -> bool:
        """Whether no node has this one as a child; a job's own filter does not count."""
        return all(parent.driver in JOB_FILTERS for parent in self.parents(name))


def named_nodes(picture: Graph, images: Iterable[Node]) -> list[str]:
    """The nodes of images, top down; those that QEMU has named itself go with others."""
    found = [name for image in images for name in picture.image_nodes(image.name)]
    return [name for name in found if picture.nodes[name].named_by_user]


async def read(monitor: Monitor) -> Graph:
    """Read the whole graph.

    Raises:
        Refused: reading it would crash this QEMU: some do not survive ``query-named-block-nodes``
            while a concluded backup or stream job has not been dismissed.
    """
    await _beware_of_concluded_jobs(monitor)
    drives, nodes, debug = await asyncio.gather(
        monitor.execute("query-block"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
        _debug_graph(monitor),
    )
    return parse(drives, nodes, debug)


def parse(
    drives: Iterable[Mapping[str, Any]],
    nodes: Iterable[Mapping[str, Any]],
    debug: Mapping[str, Any] | None,
) -> Graph:
    """Build the graph from QEMU's replies.

    Args:
        drives: of ``query-block``.
        nodes: of ``query-named-block-nodes``, flat.
        debug: of ``x-debug-query-block-graph``; None on a QEMU without it.
    """
    children, users = _edges(debug) if debug is not None else ({}, {})
    parsed = {}
    for info in nodes:
        node = _node(info)
        if debug is None:
            below = ((c["child"], c["node-name"]) for c in info.get("children", ()))
        else:
            below = (edge for edge in children.get(node.name, ()))
        parsed[node.name] = attrs.evolve(node, children=tuple(below))
    # A node that came into being between two of the queries is not there for this reading.
    for name, node in parsed.items():
        known = tuple((role, child) for role, child in node.children if child in parsed)
        parsed[name] = attrs.evolve(node, children=known)
    return Graph(parsed, {k: tuple(v) for k, v in users.items()}, tuple(drives))


async def _debug_graph(monitor: Monitor) -> Mapping[str, Any] | None:
    try:
        reply: Mapping[str, Any] = await monitor.execute("x-debug-query-block-graph")
    except errors.CommandFailed:
        return None
    return reply


async def _beware_of_concluded_jobs(monitor: Monitor) -> None:
    jobs, version = await asyncio.gather(
        monitor.execute("query-jobs"), monitor.execute("query-version")
    )
    for job in jobs:
        fragile = version["qemu"]["major"] in _CRASH_WHEN_CONCLUDED.get(job["type"], ())
        if fragile and job["status"] == "concluded":
            raise errors.Refused(
                f"{job['type']} job {job['id']} is concluded and not dismissed: this QEMU would"
                " crash if its nodes were looked at",
                hint="qmpmirror recover puts it away"
                if names.parse_job(job["id"])
                else f'dismiss it: job-dismiss {{"id": "{job["id"]}"}}',
            )


def _edges(
    debug: Mapping[str, Any],
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[User]]]:
    things = {thing["id"]: (thing["type"], thing["name"]) for thing in debug["nodes"]}
    children: dict[str, list[tuple[str, str]]] = {}
    users: dict[str, list[User]] = {}
    for edge in debug["edges"]:
        kind, parent = things[edge["parent"]]
        _, child = things[edge["child"]]
        if kind == "block-driver":
            children.setdefault(parent, []).append((edge["name"], child))
        else:
            user = User(kind, parent, edge["name"], writes="write" in edge["perm"])
            users.setdefault(child, []).append(user)
    return children, users


def _node(info: Mapping[str, Any]) -> Node:
    image = info["image"]
    specific = image.get("format-specific", {}).get("data", {})
    return Node(
        name=info["node-name"],
        driver=info["drv"],
        filename=image.get("filename", info["file"]),
        read_only=info["ro"],
        virtual_size=image["virtual-size"],
        actual_size=image.get("actual-size"),
        cluster_size=image.get("cluster-size", 0),
        extended_l2=specific.get("extended-l2", False),
        cache_direct=info["cache"]["direct"],
        cache_no_flush=info["cache"]["no-flush"],
        detect_zeroes=info["detect_zeroes"],
        bitmaps=tuple(_bitmaps(info.get("dirty-bitmaps", ()))),
        backing_filename=image.get("full-backing-filename", image.get("backing-filename", "")),
        backing_format=image.get("backing-filename-format", ""),
        encrypted=image.get("encrypted", False),
    )


def _bitmaps(infos: Iterable[Mapping[str, Any]]) -> Iterator[Bitmap]:
    for info in infos:
        yield Bitmap(
            name=info.get("name", ""),
            granularity=info["granularity"],
            count=info["count"],
            persistent=info["persistent"],
            recording=info["recording"],
            inconsistent=info.get("inconsistent", False),
        )


def _plain_path(filename: str) -> str:
    """QEMU writes ``json:{...}`` for a path whose options a plain name could not carry."""
    if not filename.startswith("json:"):
        return filename.removeprefix("file:")
    options = json.loads(filename.removeprefix("json:"))
    return str(options.get("filename", ""))
