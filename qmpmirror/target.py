# SPDX-License-Identifier: MIT
"""Destinations: what the user gave, and the steps that create and open it in QEMU."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import errors, names
from qmpmirror.steps import Command, CreateImage, Execute, ProveAbsent, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.graph import Graph, Node
    from qmpmirror.schema import Schema

_OPENED_BY_PATH: Final = "file"
_HEADERLESS: Final = "raw"
_NOT_CREATED: Final = frozenset(
    {"file", "gluster", "luks", "nfs", "rbd", "sheepdog", "ssh", "vhdx"}
)
"""What ``blockdev-create`` offers and is not an image format that a guest could run on."""


@attrs.frozen
class Destination:
    """A local file that does not exist yet, or is empty.

    Attributes:
        path: absolute.
        format: such as ``qcow2``.
        exists: whether an empty file is there already: it is used, and never removed.
    """

    path: str
    format: str
    exists: bool = False


@attrs.frozen
class Layout:
    """What the image to create must look like.

    Attributes:
        size: virtual size in bytes.
        backing_node: the node to share as backing; empty for none.
        backing_file: what the header says of it.
        backing_format: its format.
        cluster_size: in bytes; 0 for QEMU's choice.
        extended_l2: whether qcow2 clusters get subclusters.
    """

    size: int
    backing_node: str = ""
    backing_file: str = ""
    backing_format: str = ""
    cluster_size: int = 0
    extended_l2: bool = False

    @classmethod
    def of(cls, source: Node, new_format: str) -> Layout:
        """As the source: its size, and the clusters when both are qcow2."""
        alike = source.driver == new_format == "qcow2"
        return cls(
            size=source.virtual_size,
            cluster_size=source.cluster_size if alike else 0,
            extended_l2=source.extended_l2 and alike,
        )

    def on(self, graph: Graph, backing: str, folder: str | None) -> Layout:
        """The same with a backing file: the image at or below the node ``backing``."""
        image = graph.image(backing)
        return attrs.evolve(
            self,
            backing_node=backing,
            backing_file=_backing_string(graph, image, folder),
            backing_format=image.driver,
        )


def formats(schema: Schema) -> list[str]:
    """The image formats that this QEMU can create and a copy can have."""
    return sorted(schema.creatable_drivers() - _NOT_CREATED | {_HEADERLESS})


def check(
    text: str, new_format: str, schema: Schema, used: Sequence[str], *, sees_our_files: bool
) -> Destination:
    """Find out whether a new image can be made at a path, before anything changes.

    Args:
        text: the path, absolute.
        new_format: the format of the image.
        schema: what this QEMU can create.
        used: paths of the source's own chain.
        sees_our_files: whether the path means the same file to us and to QEMU.

    Raises:
        Unsupported: QEMU cannot create the format.
        DestinationError: it is in use, or no file can be made there.
        DestinationExists: something is there.
    """
    if new_format not in formats(schema):
        raise errors.Unsupported(
            f"format {new_format!r} cannot be created by this QEMU: it offers"
            f" {', '.join(formats(schema))}"
        )
    if not sees_our_files:
        return Destination(text, new_format)
    if any(os.path.realpath(path) == os.path.realpath(text) for path in used):
        raise errors.DestinationError(
            f"{text} is the source disk itself, or in its backing chain", destination=text
        )
    try:
        found = os.stat(text)
    except FileNotFoundError:
        folder = os.path.dirname(text)
        if not os.path.isdir(folder):
            raise errors.DestinationError(
                f"{text} cannot be created: there is no folder {folder}", destination=text
            ) from None
        return Destination(text, new_format)
    except OSError as error:
        raise errors.DestinationError(f"{text}: {error.strerror}", destination=text) from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise errors.DestinationError(f"{text} is {kind}", destination=text)
    if found.st_size:
        raise errors.DestinationExists(
            f"{text} exists already and is not empty",
            destination=text,
            hint="give a new path, or remove the file if it is not needed",
        )
    return Destination(text, new_format, exists=True)


@attrs.frozen
class Creation:
    """The steps that create an image.

    Attributes:
        steps: in order; they leave the storage node open.
        last: what remains to be done when the copy's own job runs, and is QEMU's record of the run.
    """

    steps: tuple[Step, ...] = ()
    last: tuple[Execute, ...] = ()


def creation(
    run: str,
    destination: Destination,
    layout: Layout,
    source: Node,
    schema: Schema,
    *,
    sees_our_files: bool,
) -> Creation:
    """Plan the creation of an image by QEMU itself (``blockdev-create``)."""
    steps: list[Step] = []
    storage = names.node_name(run, "storage")
    if not sees_our_files:
        steps.append(ProveAbsent(destination.path, names.node_name(run, "probe")))
    # A file that only QEMU sees is not ours to remove by its path.
    ours = sees_our_files and not destination.exists
    headerless = destination.format == _HEADERLESS
    file = CreateImage(
        str(names.created_file(run, destination.path, ours=ours)),
        {
            "driver": _OPENED_BY_PATH,
            "filename": destination.path,
            "size": layout.size if headerless else 0,
        },
        makes_file=destination.path if ours else "",
    )
    steps += [file, _open_storage(storage, destination.path, source)]
    if not headerless:
        options = _format_options(destination, layout, storage, schema)
        header = CreateImage(str(names.created_header(run)), options)
        steps += [header, header.dismissal()]
    return Creation(tuple(steps), (file.dismissal(),))


def opening(run: str, destination: Destination, layout: Layout, source: Node) -> Step:
    """The step that opens the format node over the storage node.

    The backing node is the source's own, from the very start: a ``sync=top`` mirror onto a target
    without it corrupts the copy as soon as a write is smaller than a cluster.
    """
    options: dict[str, Any] = {
        "driver": destination.format,
        "node-name": names.node_name(run, "format"),
        "file": names.node_name(run, "storage"),
        "read-only": False,
        **_carried_over(source),
    }
    if source.detect_zeroes != "off":
        # Zero writes with "unmap" lose data on qcow2 before 10.0.11 and 11.0.2.
        options["detect-zeroes"] = "on" if destination.format == "qcow2" else source.detect_zeroes
    if layout.backing_node:
        options["backing"] = layout.backing_node
    elif destination.format in _BACKABLE:
        options["backing"] = None
    return _add(options)


_BACKABLE: Final = frozenset({"qcow", "qcow2", "qed", "vmdk"})


def can_have_backing(new_format: str) -> bool:
    """Whether images of a format can have a backing file."""
    return new_format in _BACKABLE


def close_storage(run: str) -> Step:
    """The step that closes the storage node again, for ``drive-mirror``, which opens by path."""
    return Execute(Command("blockdev-del", {"node-name": names.node_name(run, "storage")}))


def _open_storage(node: str, path: str, source: Node) -> Step:
    return _add(
        {
            "driver": _OPENED_BY_PATH,
            "node-name": node,
            "filename": path,
            "read-only": False,
            **_carried_over(source),
        }
    )


def _carried_over(source: Node) -> dict[str, Any]:
    return {
        # Without this, zeroes are written out in full by QEMU 10.0 and older.
        "discard": "unmap",
        "cache": {"direct": source.cache_direct, "no-flush": source.cache_no_flush},
    }


def _format_options(
    destination: Destination, layout: Layout, storage: str, schema: Schema
) -> dict[str, Any]:
    options: dict[str, Any] = {"driver": destination.format, "file": storage, "size": layout.size}
    if layout.cluster_size:
        options["cluster-size"] = layout.cluster_size
    if layout.extended_l2:
        options["extended-l2"] = True
    if destination.format == "vpc":
        # Else the size must be one that a CHS geometry can express, and few are.
        options["force-size"] = True
    if layout.backing_file:
        options["backing-file"] = layout.backing_file
        if schema.has_creation_option(destination.format, "backing-fmt"):
            options["backing-fmt"] = layout.backing_format
    return options


def _add(options: dict[str, Any]) -> Execute:
    return Execute(
        Command("blockdev-add", options),
        reverse=Command("blockdev-del", {"node-name": options["node-name"]}),
    )


def _backing_string(graph: Graph, image: Node, folder: str | None) -> str:
    """What a header must say to find an image again; paths are absolute, as libvirt's are."""
    path = graph.path(image.name)
    sliced = image.driver == _HEADERLESS and image.filename.startswith("json:")
    if not path or sliced:
        return image.filename
    if os.path.isabs(path):
        return path
    if folder is None:
        raise errors.Refused(
            f"the backing file {path} is relative to QEMU's folder, which cannot be found out here",
            hint="start QEMU with absolute paths, or give its pid as domain",
        )
    return os.path.normpath(os.path.join(folder, path))
