# SPDX-License-Identifier: MIT
"""What the user gave as destination: a path, an NBD URL, or QEMU's own block device options."""

from __future__ import annotations

import enum
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import attrs

from qmpmirror import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NBD_PORT: Final = 10809
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOOKED_AT: Final = 1024 * 1024
_MAGICS: Final[Sequence[tuple[bytes, str]]] = (
    (b"QFI\xfb\0\0\0\2", "qcow2"),
    (b"QFI\xfb\0\0\0\3", "qcow2"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"LUKS\xba\xbe", "luks"),
)


class Kind(enum.Enum):
    """What a destination is to QEMU."""

    FILE = "file"
    BLOCK = "block device"
    PROTOCOL = "protocol"
    IMAGE = "image"


@attrs.frozen
class Destination:
    """Where a copy goes.

    Attributes:
        text: for people: an absolute path, or what the user gave.
        kind: what it is to QEMU.
        options: the block device options of its protocol node; of the whole image for `Kind.IMAGE`.
        exists: whether something is there already.
    """

    text: str
    kind: Kind
    options: Mapping[str, Any]
    exists: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this host."""
        return self.kind in {Kind.FILE, Kind.BLOCK}


def parse(text: str) -> Destination:
    """Understand a destination.

    It is a path (absolute, or relative to this process's folder) of a file or a block device,
    ``nbd://HOST[:PORT]/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, or ``json:{...}`` with the
    options of ``blockdev-add``: those of a protocol, or of a whole image with its ``file``.

    Raises:
        UsageError: it is none of these.
    """
    if not text or "\0" in text:
        raise errors.UsageError(f"destination {text!r} is no path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise errors.UsageError(
            f"destination {text!r} is not UTF-8, and QMP can carry nothing else"
        ) from None
    if text.startswith("json:"):
        return _json(text)
    if text.startswith(("nbd://", "nbd+unix://")):
        return _nbd(text)
    if _URL.match(text):
        raise errors.UsageError(
            f"destination {text!r}: nbd:// and nbd+unix:// are the only URLs",
            hint='give the options of blockdev-add instead: json:{"driver": ...}',
        )
    path = os.path.abspath(text)
    return Destination(path, Kind.FILE, {"driver": "file", "filename": path})


def look(destination: Destination, used: Sequence[str], *, blockdev: bool) -> Destination:
    """Look at a local destination with our own eyes, before anything changes.

    Args:
        destination: the destination.
        used: paths of the source's own chain.
        blockdev: whether the user said that it is a block device.

    Raises:
        DestinationError: it is in use, is of the wrong kind, or cannot be there.
    """
    path = destination.text
    if any(os.path.realpath(other) == os.path.realpath(path) for other in used):
        raise _refused(path, "is the source disk itself, or in its backing chain")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if blockdev:
            raise _refused(path, "does not exist") from None
        if not os.path.isdir(folder):
            raise _refused(path, f"cannot be created: there is no folder {folder}") from None
        return destination
    except OSError as error:
        raise _refused(path, f"cannot be created: {error.strerror}") from None
    if any(os.path.exists(other) and os.path.samefile(other, path) for other in used):
        raise _refused(path, "is the source disk itself, or in its backing chain")
    if stat.S_ISBLK(mode):
        options = {"driver": "host_device", "filename": path}
        return attrs.evolve(destination, kind=Kind.BLOCK, options=options, exists=True)
    if blockdev:
        raise _refused(path, "is not a block device")
    if not stat.S_ISREG(mode):
        raise _refused(path, "is a folder" if stat.S_ISDIR(mode) else "is no regular file")
    return attrs.evolve(destination, exists=True)


def check_presence(
    destination: Destination, *, reuse: bool, overwrite: bool = False, hint: str
) -> None:
    """What is to be reused must be there; what is not must not lose anybody's data.

    Args:
        destination: a local one that was looked at.
        reuse: whether it is opened as it is.
        overwrite: whether it may be formatted in any case.
        hint: what to do when it holds something.

    Raises:
        DestinationError: it is not there.
        DestinationExists: it holds something.
    """
    if reuse and not destination.exists:
        raise _refused(destination.text, "does not exist, so it cannot be reused")
    if not destination.exists or reuse or overwrite:
        return
    if not is_empty(destination):
        raise errors.DestinationExists(
            f"{destination.text} exists already and is not empty",
            destination=destination.text,
            hint=hint,
        )


def is_empty(destination: Destination) -> bool:
    """Whether a local destination holds nothing that anybody could miss.

    A file is empty when it has no bytes; a block device when its first and last MiB are all zero:
    there partition tables, file systems, volume managers and images have their marks.

    Raises:
        DestinationError: it cannot be read.
    """
    path = destination.text
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if destination.kind is Kind.FILE:
                return size == 0
            for start in (0, max(0, size - _LOOKED_AT)):
                file.seek(start)
                if any(file.read(_LOOKED_AT)):
                    return False
    except OSError as error:
        raise _refused(path, f"cannot be looked at: {error.strerror}") from None
    return True


def probe(destination: Destination) -> str:
    """The format of a local image, by its first bytes; ``raw`` when they say nothing.

    Raises:
        DestinationError: it cannot be read.
    """
    try:
        with open(destination.text, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise _refused(destination.text, f"cannot be looked at: {error.strerror}") from None
    return next((name for magic, name in _MAGICS if start.startswith(magic)), "raw")


def _json(text: str) -> Destination:
    try:
        options = json.loads(text.removeprefix("json:"))
    except ValueError as error:
        raise errors.UsageError(f"destination {text!r} is no JSON: {error}") from None
    if not isinstance(options, dict) or not isinstance(options.get("driver"), str):
        raise errors.UsageError(f"destination {text!r} names no driver")
    if "node-name" in options:
        raise errors.UsageError(
            f"destination {text!r} has a node-name: the node gets one of our own"
        )
    kind = Kind.IMAGE if "file" in options else Kind.PROTOCOL
    return Destination(text, kind, options, exists=True)


def _nbd(text: str) -> Destination:
    url = urlsplit(text)
    export = unquote(url.path.removeprefix("/"))
    server: dict[str, str]
    if url.scheme == "nbd+unix":
        sockets = parse_qs(url.query).get("socket", [])
        if len(sockets) != 1:
            raise errors.UsageError(f"destination {text!r} needs ?socket=PATH")
        server = {"type": "unix", "path": os.path.abspath(sockets[0])}
    else:
        try:
            port = url.port or _NBD_PORT
        except ValueError:
            raise errors.UsageError(f"destination {text!r} has no valid port") from None
        if not url.hostname:
            raise errors.UsageError(f"destination {text!r} names no host")
        server = {"type": "inet", "host": url.hostname, "port": str(port)}
    options: dict[str, Any] = {"driver": "nbd", "server": server}
    if export:
        options["export"] = export
    return Destination(text, Kind.PROTOCOL, options, exists=True)


def _refused(path: str, why: str) -> errors.DestinationError:
    return errors.DestinationError(f"{path} {why}", destination=path)
