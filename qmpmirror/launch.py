# SPDX-License-Identifier: MIT
"""What to write on QEMU's next command line, since nobody rewrites it for its user."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import commandline, errors, names
from qmpmirror.commandline import Words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor

_OBJECTS: Final = {
    "secret": ("secret", "file"),
    "tls": ("tls-creds-x509,endpoint=client,verify-peer=on", "dir"),
}
"""What our objects are, by role, and the property that says what the user gave."""

_NAMED_BY_QEMU: Final = re.compile(
    r"(?:(?P<paired>ide|scsi)(?P<bus>\d+)-(?P<media>hd|cd)(?P<unit>\d+)"
    r"|(?P<interface>floppy|mtd|pflash|sd|virtio|xen)(?P<index>\d+))"
)
"""What QEMU calls a ``-drive`` without an id: it says where the drive is connected."""

_NBD: Final = re.compile(
    r"nbd\+unix://(?:/(?P<unix>.*?))?\?socket=(?P<path>.*)"
    r"|nbd://(?P<host>[^/]*):(?P<port>\d+)(?:/(?P<inet>.*))?",
    re.DOTALL,
)
"""How QEMU names an NBD export: nothing is escaped, so that ``-drive`` may not take it again."""

_KEPT: Final = re.compile(
    r"cache(\..*)?|discard|aio|(auto-)?read-?only|(detect-zeroes|copy-on-read|locking)"
    r"|[rw]error|throttling\..*|(bps|iops)(_.*)?"
)
"""Options of a ``-drive`` that go on with another image."""

_KEPT_OF_NODE: Final = ("discard", "auto-read-only")
_KEPT_OF_FILE: Final = (
    *("node-name", "aio", "aio-max-batch", "locking", "discard", "auto-read-only"),
    *("cache.direct", "cache.no-flush"),
)
_LOCAL: Final = frozenset({"file", "host_device"})
_SWITCH: Final = {True: "on", False: "off"}
_PLAIN_NBD: Final = re.compile(r"[\w.~/?=+-]+(:\d+)?[\w.~/?=+-]*")


@attrs.frozen
class Opened:
    """How a copy is open, beyond its path.

    Attributes:
        storage: the driver of its protocol node.
        filename: where it is, as QEMU names it: a path, a URL or ``json:{...}``.
        size: of a window that is smaller than its storage, in bytes; 0 for the whole of it.
        tls: the id of its TLS credentials; empty without TLS.
        secret: the id of its passphrase; empty when it is not encrypted.
        objects: the words that make the objects which it needs.
        words: how the disk's first image was opened, when QEMU was started.
    """

    storage: str
    filename: str
    size: int = 0
    tls: str = ""
    secret: str = ""
    objects: tuple[str, ...] = ()
    words: Words = attrs.field(factory=Words)


async def read(monitor: Monitor, picture: Graph, disk: Disk, node: str, run: str) -> Opened:
    """How a disk's image is open; the objects of its run, if any, are looked up by ``qom-get``."""
    target = picture.nodes[node]
    storage = picture.storage(target.name)
    windowed = target.driver == "raw" and target.virtual_size < storage.virtual_size
    found = {}
    for role, (what, where) in _OBJECTS.items() if run else ():
        name = names.node_name(run, role)
        arguments = {"path": f"/objects/{name}", "property": where}
        try:
            value = str(await monitor.execute("qom-get", arguments))
        except errors.CommandFailed:
            continue
        found[role] = name, f"{what},id={name},{where}={_escaped(value)}"
    return Opened(
        storage.driver,
        picture.path(target.name) or storage.filename,
        size=target.virtual_size if windowed else 0,
        tls=found["tls"][0] if "tls" in found else "",
        secret=found["secret"][0] if "secret" in found else "",
        objects=tuple(word for _, text in found.values() for word in ("-object", text)),
        words=commandline.words(monitor.pid, disk),
    )


def options(
    disk: Disk, destination: str, new_format: str, opened: Opened | None = None
) -> list[str]:
    """The words that open the copy in the place of the disk's old image.

    A disk of ``-drive`` gets a ``-drive`` with the same place or the same id, one of ``-blockdev``
    a ``-blockdev`` with the same node name, so that the rest of the command line stays as it was.
    An image that is described inside of its filter's ``-blockdev`` has no name: it gets none here.

    What QEMU does not tell, such as ``aio``, is taken from its command line where that can be read.

    Args:
        disk: the disk as it was.
        destination: the path of the copy.
        new_format: its image format.
        opened: how it is open; None for a plain file at that path.
    """
    opened = opened or Opened("file", destination)
    if disk.drive:
        words = [*_file(opened), f"format={new_format}"]
        words += _place(disk)
        given = _special(opened, new_format)
        if disk.image is not None:
            given |= _drive_options(disk.image)
        given = _kept(opened.words.options, given)
        words += [f"{key}={value}" for key, value in given.items()]
        return [*opened.objects, "-drive", ",".join(words)]
    node: dict[str, Any] = {"driver": new_format}
    if name := _node_name(disk, opened.words):
        node["node-name"] = name
    node["file"] = _protocol(opened)
    if node["file"]["driver"] in _LOCAL and opened.words.storage.get("driver") in _LOCAL:
        node["file"] |= _nested(_typed(opened.words.storage, _KEPT_OF_FILE))
    node |= _nested(_typed(opened.words.options, _KEPT_OF_NODE))
    node |= _nested(_special(opened, new_format)) | _node_options(disk.image)
    return [*opened.objects, "-blockdev", json.dumps(node)]


def _node_name(disk: Disk, words: Words) -> str:
    """The name that the user's ``-device`` asks for; a copy has one that only QEMU knows."""
    if disk.image is None or not disk.image.named_by_user:
        return ""
    return words.name if words.name and names.parse_node(disk.image.name) else disk.image.name


def _kept(words: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """What a ``-drive`` said goes on, in its own words; what was found out is said besides."""
    kept = {key: value for key, value in words.items() if _KEPT.fullmatch(key)}
    if "cache" in kept:
        found = {key: value for key, value in found.items() if not key.startswith("cache.")}
    return {**found, **kept}


def _typed(words: Mapping[str, str], keys: Iterable[str]) -> dict[str, Any]:
    """Some of the options of a ``-blockdev``, as its JSON has them."""
    values = {"on": True, "True": True, "off": False, "False": False}
    switches = ("auto-read-only", "cache.direct", "cache.no-flush")
    return {
        key: values.get(words[key], words[key]) if key in switches else words[key]
        for key in keys
        if key in words
    }


def _escaped(value: str) -> str:
    return value.replace(",", ",,")


def _special(opened: Opened, new_format: str) -> dict[str, Any]:
    """What the image itself needs, with dotted keys."""
    given: dict[str, Any] = {"size": opened.size} if opened.size else {}
    if opened.secret and new_format == "qcow2":
        given |= {"encrypt.format": "luks", "encrypt.key-secret": opened.secret}
    elif opened.secret:
        given["key-secret"] = opened.secret
    return given


def _protocol(opened: Opened) -> dict[str, Any]:
    """The options of the copy's protocol node."""
    if opened.filename.startswith("json:"):
        return _nested(json.loads(opened.filename.removeprefix("json:")))
    if opened.storage == "nbd":
        return _nbd(opened)
    return {"driver": opened.storage, "filename": opened.filename}


def _file(opened: Opened) -> list[str]:
    """What a ``-drive`` says of the protocol node: a short name when one will do."""
    plain = _PLAIN_NBD.fullmatch(opened.filename.partition("://")[2])
    unclear = opened.storage == "nbd" and (opened.tls or not plain)
    if not unclear and not opened.filename.startswith("json:"):
        return [f"file={_escaped(opened.filename)}"]
    return [f"file.{key}={_escaped(value)}" for key, value in _flat(_protocol(opened))]


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Options as ``-drive`` takes them: with dotted keys."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _SWITCH[value] if isinstance(value, bool) else str(value)


def _nbd(opened: Opened) -> dict[str, Any]:
    """The options of an NBD export, from what QEMU calls it."""
    found = _NBD.fullmatch(opened.filename)
    if found is None:
        return {"driver": "nbd", "filename": opened.filename}
    server = {"type": "unix", "path": found["path"]}
    if found["host"]:
        server = {"type": "inet", "host": found["host"], "port": found["port"]}
    options: dict[str, Any] = {"driver": "nbd", "server": server}
    if export := found["unix"] or found["inet"]:
        options["export"] = export
    return options | ({"tls-creds": opened.tls} if opened.tls else {})


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as ``-blockdev`` takes them: as objects."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


def _place(disk: Disk) -> list[str]:
    """How the drive is connected to the guest."""
    found = _NAMED_BY_QEMU.fullmatch(disk.drive)
    media = ["media=cdrom"] if disk.removable and not disk.target.startswith("fd") else []
    if found is not None and not disk.device:
        if found["index"]:
            return [f"if={found['interface']}", f"index={found['index']}"]
        place = [f"if={found['paired']}", f"bus={found['bus']}", f"unit={found['unit']}"]
        return place + media
    if not disk.qom_path.startswith("/machine/unattached/"):
        return ["if=none", f"id={disk.drive}"]
    # A drive that the board itself connects; if= may be left to the machine's default.
    floppy = ["if=floppy"] if disk.target.startswith("fd") else []
    return [*floppy, f"id={disk.drive}", *media]


def _drive_options(image: Node) -> dict[str, str]:
    found = {
        "cache.direct": "on" if image.cache_direct else "",
        "cache.no-flush": "on" if image.cache_no_flush else "",
        "read-only": "on" if image.read_only else "",
    }
    return {key: value for key, value in found.items() if value} | _zero_options(image)


def _node_options(image: Node | None) -> dict[str, Any]:
    if image is None:
        return {}
    found: dict[str, Any] = {}
    if image.cache_direct or image.cache_no_flush:
        found["cache"] = {"direct": image.cache_direct, "no-flush": image.cache_no_flush}
    if image.read_only:
        found["read-only"] = True
    return found | _zero_options(image)


def _zero_options(image: Node) -> dict[str, str]:
    if image.detect_zeroes == "unmap":
        # QEMU takes it only together with this.
        return {"discard": "unmap", "detect-zeroes": "unmap"}
    return {"detect-zeroes": "on"} if image.detect_zeroes == "on" else {}
