# SPDX-License-Identifier: MIT
"""Prove that an operation left nothing behind: in QEMU's block graph, or in a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


class Execute(Protocol):
    """A blocking call of one QMP command, such as `Qemu.execute`."""

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """Execute the command and return what QEMU returned."""
        ...


@attrs.frozen
class Item:
    """One thing of the block graph.

    Attributes:
        name: What it is and how it is called, such as ``node 'fmt0'``.
        state: What must not change.
        detail: What else a reader of the failure wants to know.
    """

    name: str
    state: str
    detail: str = attrs.field(eq=False, default="")

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, (self.state, self.detail)))})"


@attrs.frozen
class GraphSnapshot:
    """Jobs, nodes, bitmaps, exports and devices of a QEMU at one moment.

    Nodes whose name QEMU generated (``#block123``) are known by driver and file: QEMU counts on
    when it opens the same file again.
    """

    items: Mapping[str, Item]

    @classmethod
    def take(cls, execute: Execute) -> GraphSnapshot:
        """Read the graph: ``query-jobs``, ``query-named-block-nodes``, ``query-block`` and so on.

        What this QEMU (or storage daemon) has no command for, it has none of.

        Args:
            execute: For example the ``execute`` of a `Qemu`.
        """
        known = {command["name"] for command in execute("query-commands")}
        items: dict[str, Item] = {}
        for command, parse in _PARSERS.items():
            if command in known:
                for item in parse(execute(command)):
                    items[_unique(item.name, items)] = item
        return cls(items)

    def differences(self, after: GraphSnapshot) -> list[str]:
        """In words, each thing that is left over, gone or changed in a later snapshot."""
        found = []
        for name, item in after.items.items():
            old = self.items.get(name)
            if old is None:
                found.append(f"left over: {item}")
            elif old != item:
                found.append(f"changed: {old} is now {item}")
        found += [f"gone: {item}" for name, item in self.items.items() if name not in after.items]
        return found


def assert_clean_graph(execute: Execute, before: GraphSnapshot) -> None:
    """Check that the block graph is what it was.

    Args:
        execute: The QEMU of the snapshot.
        before: The graph as it should be.

    Raises:
        AssertionError: It is not; the message names each job, node, bitmap, export or device that
            is left over, gone or changed.
    """
    found = before.differences(GraphSnapshot.take(execute))
    if found:
        raise AssertionError("the block graph is not what it was:\n  " + "\n  ".join(found))


def files_in(directory: Path) -> frozenset[str]:
    """Everything below a directory, as paths relative to it, for `assert_no_new_files`."""
    return frozenset(str(path.relative_to(directory)) for path in directory.rglob("*"))


def assert_no_new_files(directory: Path, before: Collection[str]) -> None:
    """Check that a directory holds nothing that it did not hold before.

    Args:
        directory: The directory.
        before: What `files_in` found there.

    Raises:
        AssertionError: There are new files; the message names them.
    """
    new = sorted(files_in(directory) - frozenset(before))
    if new:
        raise AssertionError(f"left over in {directory}: {', '.join(new)}")


def _unique(name: str, taken: Collection[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name} ({number})"
    return unique


def _jobs(reply: list[dict[str, Any]]) -> Iterator[Item]:
    for job in reply:
        yield Item(
            f"job '{job['id']}'", job["type"], ", ".join([job["status"], job.get("error", "")])
        )


def _node_name(node: dict[str, Any]) -> str:
    name: str = node.get("node-name", "#")
    # A node without a file of its own has a json: description, which names implicit children.
    file = node["file"] if not node["file"].startswith("json:") else ""
    return f"#block {node['drv']} {file}".rstrip() if name.startswith("#") else name


def _nodes(reply: list[dict[str, Any]]) -> Iterator[Item]:
    for node in reply:
        name = _node_name(node)
        access = "read-only" if node["ro"] else "writable"
        depth = f"backing depth {node['backing_file_depth']}"
        yield Item(f"node '{name}'", f"{node['drv']}, {access}, {depth}", node["file"])
        for bitmap in node.get("dirty-bitmaps", []):
            kind = "persistent" if bitmap["persistent"] else "transient"
            state = f"{kind}, {'recording' if bitmap['recording'] else 'disabled'}"
            # Jobs keep their own bitmaps without a name.
            yield Item(f"bitmap '{bitmap.get('name', '')}' of node '{name}'", state)


def _exports(reply: list[dict[str, Any]]) -> Iterator[Item]:
    for export in reply:
        yield Item(f"export '{export['id']}'", f"{export['type']} of '{export['node-name']}'")


def _devices(reply: list[dict[str, Any]]) -> Iterator[Item]:
    for device in reply:
        inserted = device.get("inserted")
        root = f"on node '{_node_name(inserted)}'" if inserted else "empty"
        name = device["device"] or device.get("qdev", "")
        yield Item(f"device '{name}'", root, inserted["file"] if inserted else "")


_PARSERS = {
    "query-jobs": _jobs,
    "query-named-block-nodes": _nodes,
    "query-block-exports": _exports,
    "query-block": _devices,
}
