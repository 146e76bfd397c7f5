# SPDX-License-Identifier: MIT
"""The target of a copy: the steps that create an image and open it in QEMU.

A target has a storage node (protocol) and a format node over it; the mirror writes to the latter.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import creation, errors, names
from qmpmirror.destination import Destination, Kind
from qmpmirror.names import Flag
from qmpmirror.opening import OpenImage
from qmpmirror.steps import Command, CreateImage, Execute, ProveAbsent, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.graph import Graph, Node
    from qmpmirror.schema import Schema

_HEADERLESS: Final = frozenset({"raw"})
_BACKABLE: Final = frozenset({"qcow", "qcow2", "qed", "vmdk"})
_NOT_FORMATS: Final = frozenset({"file", "gluster", "nfs", "rbd", "sheepdog", "ssh", "vhdx"})
"""What ``blockdev-create`` offers and is not an image format that a guest could run on."""


@attrs.frozen(kw_only=True)
class Wish:
    """What the user wants the target to be.

    Attributes:
        format: its image format.
        reuse: it was prepared by the user: open it, do not format it.
        options: creation options, as of ``blockdev-create``.
        secret: a file with the passphrase; encrypts a new image with LUKS, opens an encrypted one.
        tls_creds: a folder with TLS credentials for NBD.
        detect_zeroes: ``off``, ``on`` or ``unmap``; empty for the source's.
        synchronous: whether guest writes are going to wait for the target.
        is_zero: the user says that it reads as zeroes.
        server_seconds: how long to wait for a server that is not up yet.
        aio: how QEMU reads and writes a local file or device; empty for its default.
        late_chain: a new image's backing file is not there yet: it is opened at the pivot.
    """

    format: str
    reuse: bool = False
    options: Mapping[str, Any] = attrs.field(factory=dict)
    secret: str = ""
    tls_creds: str = ""
    detect_zeroes: str = ""
    synchronous: bool = False
    is_zero: bool = False
    server_seconds: float = 0.0
    aio: str = ""
    late_chain: bool = False


@attrs.frozen
class Layout:
    """What the image must look like.

    Attributes:
        size: virtual size in bytes.
        backing_node: the node to share as backing; empty for none.
        backing_file: what the header says of it.
        backing_format: its format.
        backing_size: its virtual size in bytes.
        cluster_size: in bytes; 0 for QEMU's choice.
        extended_l2: whether qcow2 clusters get subclusters.
    """

    size: int
    backing_node: str = ""
    backing_file: str = ""
    backing_format: str = ""
    backing_size: int = 0
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
            backing_file=backing_string(graph, image, folder),
            backing_format=image.driver,
            backing_size=image.virtual_size,
        )


@attrs.frozen
class Target:
    """The steps that make a target.

    Attributes:
        steps: in order; after them the format node is open.
        last: what remains to be done when the copy's own job runs, and is QEMU's record of the run.
        flags: what the job's name must remember.
        zeroed: whether the target is known to read as zeroes.
    """

    steps: tuple[Step, ...] = ()
    last: tuple[Execute, ...] = ()
    flags: frozenset[Flag] = frozenset()
    zeroed: bool = False


def formats(schema: Schema) -> list[str]:
    """The image formats that this QEMU can create and a copy can have."""
    return sorted(schema.creatable_drivers() - _NOT_FORMATS | _HEADERLESS)


def can_have_backing(new_format: str) -> bool:
    """Whether images of a format can have a backing file."""
    return new_format in _BACKABLE


@attrs.frozen(kw_only=True)
class Planner:
    """Plans the steps for one destination.

    Attributes:
        run: the run's id.
        destination: where the copy goes.
        wish: what the user wants it to be.
        layout: what it must look like.
        source: the image that is copied.
        schema: what this QEMU can do.
        sees_our_files: whether a path means the same file to us and to QEMU.
        overlay: whether it is going to be hung over its backing by ``blockdev-snapshot``.
    """

    run: str
    destination: Destination
    wish: Wish
    layout: Layout
    source: Node
    schema: Schema
    sees_our_files: bool
    overlay: bool = False

    @property
    def storage(self) -> str:
        """The name of the storage node."""
        return names.node_name(self.run, "storage")

    @property
    def ours(self) -> bool:
        """Whether the file comes into being by us, and is ours to remove."""
        new = self.destination.kind is Kind.FILE and not self.destination.exists
        return new and self.sees_our_files and not self.wish.reuse

    @property
    def data_file(self) -> str:
        """The path of an external data file, if the image shall have one."""
        given = self.wish.options.get("data_file", self.wish.options.get("data-file", ""))
        return os.path.abspath(given) if given else ""

    def plan(self) -> Target:
        """Plan them.

        Raises:
            Unsupported: QEMU cannot create the format, or has no such driver.
        """
        driver = self.destination.options["driver"]
        if driver not in self.schema.values("blockdev-add", "driver"):
            raise errors.Unsupported(
                f"this QEMU has no driver {driver!r} for {self.destination.text}",
                command="blockdev-add",
                argument="driver",
            )
        creates = not self.wish.reuse and self.destination.kind is not Kind.IMAGE
        if creates and self.wish.format not in formats(self.schema):
            raise errors.Unsupported(
                f"format {self.wish.format!r} cannot be created by this QEMU: it offers"
                f" {', '.join(formats(self.schema))}"
            )
        steps: list[Step] = list(self._objects())
        last: list[Execute] = []
        if creates and self.data_file:
            data = self._create_data_file()
            steps += [data, self._open_data_file()]
            last.append(data.dismissal())
        if self.destination.kind is Kind.FILE and creates:
            if not self.sees_our_files:
                probe = names.node_name(self.run, "probe")
                steps.append(ProveAbsent(self.destination.text, probe))
            file = self._create_file()
            steps.append(file)
            last.append(file.dismissal())
        if self.destination.kind is not Kind.IMAGE:
            steps.append(self._open_storage())
        if creates and self.wish.format not in _HEADERLESS:
            header = CreateImage(str(names.created_header(self.run)), self._create_options())
            steps += [header, header.dismissal()]
        steps.append(self._open_format(new=creates))
        return Target(tuple(steps), tuple(last), self._flags(), self._zeroed(new=creates))

    def _objects(self) -> list[Step]:
        objects = []
        if self.wish.secret:
            secret = {"qom-type": "secret", "file": os.path.abspath(self.wish.secret)}
            objects.append(self._object("secret", secret))
        if self.wish.tls_creds:
            creds = {"qom-type": "tls-creds-x509", "endpoint": "client", "verify-peer": True}
            folder = {"dir": os.path.abspath(self.wish.tls_creds)}
            objects.append(self._object("tls", creds | folder))
        return objects

    def _object(self, role: str, properties: dict[str, Any]) -> Step:
        name = names.node_name(self.run, role)
        kind = properties.pop("qom-type")
        if self.schema.has_argument("object-add", "props"):  # QEMU 5.2
            arguments = {"qom-type": kind, "id": name, "props": properties}
        else:
            arguments = {"qom-type": kind, "id": name, **properties}
        return Execute(Command("object-add", arguments), Command("object-del", {"id": name}))

    def _create_file(self) -> CreateImage:
        path = self.destination.text
        options = {"driver": "file", "filename": path}
        headerless = self.wish.format in _HEADERLESS
        extra = self._extra_options() if headerless else {}
        return CreateImage(
            str(names.created_file(self.run, path, ours=self.ours)),
            {**options, **extra, "size": self.layout.size if headerless else 0},
            makes_file=path if self.ours else "",
        )

    def _create_options(self) -> dict[str, Any]:
        layout, driver = self.layout, self.wish.format
        options: dict[str, Any] = {"driver": driver, "file": self.storage, "size": layout.size}
        if layout.cluster_size:
            options["cluster-size"] = layout.cluster_size
        if layout.extended_l2:
            options["extended-l2"] = True
        if driver == "vpc":
            # Otherwise the size is rounded up to whole cylinders, and the mirror refuses it.
            options["force-size"] = True
        if layout.backing_file:
            options["backing-file"] = layout.backing_file
            if self.schema.has_creation_option(driver, "backing-fmt"):
                options["backing-fmt"] = layout.backing_format
        encryption = self._encryption()
        luks = creation.luks(self.schema, self.wish.options, encrypted="encrypt" in encryption)
        if luks:
            encryption["encrypt"] |= luks
        return options | self._extra_options() | encryption

    def _extra_options(self) -> dict[str, Any]:
        given = {
            name: value
            for name, value in self.wish.options.items()
            if name not in {"data_file", "data-file"} and not name.startswith(creation.ENCRYPT)
        }
        driver = "file" if self.wish.format in _HEADERLESS else self.wish.format
        extra = creation.typed(self.schema, driver, given)
        return extra | self._data_file_option()

    def _data_file_option(self) -> dict[str, Any]:
        return {"data-file": names.node_name(self.run, "data")} if self.data_file else {}

    def _create_data_file(self) -> CreateImage:
        if self.wish.format != "qcow2" or not self.sees_our_files:
            raise errors.Unsupported(f"format {self.wish.format} cannot have a data file here")
        if os.path.exists(self.data_file):
            raise errors.DestinationExists(
                f"data file {self.data_file} exists already", destination=self.data_file
            )
        options = {"driver": "file", "filename": self.data_file, "size": self.layout.size}
        job = str(names.created_data_file(self.run, self.data_file))
        return CreateImage(job, options, makes_file=self.data_file)

    def _open_data_file(self) -> Step:
        options = {"driver": "file", "filename": self.data_file, "read-only": False}
        node = {"node-name": names.node_name(self.run, "data")}
        return OpenImage(options | node | self._carried_over() | self._aio())

    def _encryption(self) -> dict[str, Any]:
        if not self.wish.secret:
            return {}
        key = {"key-secret": names.node_name(self.run, "secret")}
        return key if self.wish.format == "luks" else {"encrypt": {"format": "luks", **key}}

    def _open_storage(self) -> Step:
        options = dict(self.destination.options) | {"node-name": self.storage, "read-only": False}
        options |= self._carried_over() | self._aio()
        if self.wish.tls_creds:
            options["tls-creds"] = names.node_name(self.run, "tls")
        return OpenImage(
            options, destination=self.destination.text, seconds=self.wish.server_seconds
        )

    def _open_format(self, *, new: bool) -> Step:
        target = names.node_name(self.run, "format")
        if self.destination.kind is Kind.IMAGE:
            options = dict(self.destination.options)
        else:
            options = {"driver": self.wish.format, "file": self.storage}
            options |= self._encryption() | self._data_file_option()
        options = {**options, "node-name": target, "read-only": False, **self._carried_over()}
        options |= self._zero_detection() | self._backing()
        return OpenImage(
            options,
            size=self.layout.size,
            storage="" if self._has_its_size(new=new) else self.storage,
            needs_backing=self.wish.reuse and bool(self.layout.backing_node),
            backing_size=self.layout.backing_size if self.wish.reuse else 0,
            destination=self.destination.text,
        )

    def _has_its_size(self, *, new: bool) -> bool:
        """Whether nobody but us decided how large the storage is, or the user gave the image."""
        made = new and (self.destination.kind is Kind.FILE or self.wish.format not in _HEADERLESS)
        return made or self.destination.kind is Kind.IMAGE

    def _backing(self) -> dict[str, Any]:
        """The backing node is there from the very start.

        A ``sync=top`` mirror onto a target without it corrupts the copy as soon as the guest writes
        less than a cluster. Only a prepared image whose base may still be arriving gets it late: in
        background mode QEMU then copies whole clusters.
        """
        if self.wish.format not in _BACKABLE or "backing" in self.destination.options:
            return {}
        if not self.layout.backing_node or self.overlay or self.wish.late_chain:
            return {"backing": None}
        if not self.wish.reuse:
            return {"backing": self.layout.backing_node}
        return {} if self.wish.synchronous else {"backing": None}

    def _zero_detection(self) -> dict[str, Any]:
        wanted = self.wish.detect_zeroes or self.source.detect_zeroes
        if wanted == "off":
            return {}
        # Zero writes with "unmap" lose data on qcow2 before 10.0.11 and 11.0.2.
        return {"detect-zeroes": "on" if self.wish.format == "qcow2" else wanted}

    def _carried_over(self) -> dict[str, Any]:
        cache = {"direct": self.source.cache_direct, "no-flush": self.source.cache_no_flush}
        if self.wish.options.get("preallocation", "off") != "off":
            return {"cache": cache}  # the mirror would give back what was asked to be there
        # Without discard, zeroes are written out in full by QEMU 10.0 and older.
        return {"discard": "unmap", "cache": cache}

    def _aio(self) -> dict[str, Any]:
        if self.wish.aio != "native":
            return {"aio": self.wish.aio} if self.wish.aio else {}
        # QEMU demands it; a source may have it at its file alone.
        return {"aio": "native", "cache": {"direct": True, "no-flush": self.source.cache_no_flush}}

    def _flags(self) -> frozenset[Flag]:
        flags = set()
        if self.ours:
            flags.add(Flag.CREATED)
        if (self.wish.reuse or self.wish.late_chain) and self.layout.backing_node:
            flags.add(Flag.OWN_CHAIN if self.wish.synchronous else Flag.LATE_CHAIN)
        if self.wish.secret or self.wish.tls_creds:
            flags.add(Flag.OBJECTS)
        if self.data_file:
            flags.add(Flag.DATA_FILE)
        return frozenset(flags)

    def _zeroed(self, *, new: bool) -> bool:
        if self.layout.backing_node or self.wish.format == "luks":
            return False  # what nobody has encrypted does not decrypt to zeroes
        fresh = new and (self.destination.kind is Kind.FILE or self.wish.format in _BACKABLE)
        return self.wish.is_zero or fresh


def backing_string(graph: Graph, image: Node, folder: str | None) -> str:
    """What a header must say to find an image again; paths are absolute, as libvirt's are."""
    path = graph.path(image.name)
    sliced = image.driver == "raw" and image.filename.startswith("json:")
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
