# SPDX-License-Identifier: MIT
"""doctor: everything about a QEMU that a bug report needs, and what looks wrong. Only looks."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover, disks, errors, graph, names, runs
from qmpmirror.job import JobStatus
from qmpmirror.operations import complaints

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.runs import Run
    from qmpmirror.schema import Schema

_OBJECTS: Final = "/objects"
_CAPABILITIES: Final = (
    ("blockdev-mirror", ""),
    ("blockdev-mirror", "target-is-zero"),
    ("drive-mirror", ""),
    ("blockdev-create", ""),
    ("block-job-change", ""),
    ("job-complete", ""),
    ("job-finalize", ""),
    ("blockdev-snapshot", ""),
    ("block-commit", ""),
    ("block-stream", ""),
    ("block-export-add", ""),
    ("blockdev-reopen", ""),
    ("block-dirty-bitmap-merge", ""),
    ("x-debug-query-block-graph", ""),
)
"""Commands, and arguments of them, that decide what can be done."""

_TEMPORARY: Final = re.compile(r".*/vl\.\w+")
_SECRET_MEMBER: Final = re.compile(
    r'("[\w.-]*(?:password|passphrase|cookie|secret|token|user)[\w.-]*": *)"(?:[^"\\]|\\.)*"'
)
_USER_INFO: Final = re.compile(r"(\w://)[^\s/@\"]+@")
_QUERY: Final = re.compile(r"((?:https?|ftps?)://[^\s?\"]*\?)[^\s\"]*")


@attrs.frozen(kw_only=True)
class Checkup:
    """What a QEMU looks like at one moment.

    Attributes:
        version: QEMU's version, three numbers.
        package: who has built it, in its own words.
        name: the guest's ``-name``; empty for a storage daemon.
        status: QEMU's word for the state of the guest; empty for a storage daemon.
        target: the architecture; empty for a storage daemon.
        machine: the machine type; empty for a storage daemon.
        accel: what the vCPUs run on; empty when QEMU does not tell.
        capabilities: by command or ``COMMAND ARGUMENT``, whether it is known.
        picture: the block graph; None when it could not be read.
        disks: the disks.
        io_status: by disk: ``ok``, ``failed`` or ``nospace``.
        jobs: the reply of ``query-jobs``.
        block_jobs: the reply of ``query-block-jobs``.
        runs: our runs in it.
        exports: the reply of ``query-block-exports``.
        iothreads: ids of the iothreads.
        objects: ids of the user-created objects.
        missing: paths of images that are open and that nobody else can open any more.
        unread: why the graph could not be read; empty if it could.
    """

    version: tuple[int, int, int]
    package: str
    name: str
    status: str
    target: str
    machine: str
    accel: str
    capabilities: Mapping[str, bool]
    picture: Graph | None
    disks: tuple[Disk, ...]
    io_status: Mapping[str, str]
    jobs: tuple[JobStatus, ...]
    block_jobs: tuple[Mapping[str, Any], ...]
    runs: tuple[Run, ...]
    exports: tuple[Mapping[str, Any], ...]
    iothreads: tuple[str, ...]
    objects: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unread: str = ""

    @property
    def our_nodes(self) -> list[str]:
        """The nodes that carry our names."""
        return [name for name in (self.picture.nodes if self.picture else ()) if _is_ours(name)]

    def problems(self) -> list[str]:
        """What looks wrong, one sentence each."""
        return complaints.problems(self)

    def hazards(self) -> dict[int, str]:
        """The bugs of this QEMU that are known to lose data or to end it, by number."""
        return complaints.hazards(self.version)


async def examine(monitor: Monitor, schema: Schema) -> Checkup:
    """Look at everything; changes nothing (only ``query-*``, ``qom-get`` and ``qom-list``).

    A QEMU that its block graph cannot be read from safely is examined without it.

    Raises:
        ConnectionLost: the connection ended.
    """
    version = await monitor.execute("query-version")
    looked = _Look(monitor, schema)
    (
        jobs,
        block_jobs,
        exports,
        iothreads,
        name,
        status,
        target,
        machine,
        objects,
        accel,
    ) = await asyncio.gather(
        looked.ask("query-jobs", []),
        looked.ask("query-block-jobs", []),
        looked.ask("query-block-exports", []),
        looked.ask("query-iothreads", []),
        looked.ask("query-name", {}),
        looked.ask("query-status", {}),
        looked.ask("query-target", {}),
        looked.ask("qom-get", "", path="/machine", property="type"),
        looked.ask("qom-list", [], path=_OBJECTS),
        looked.accelerator(),
    )
    statuses = [JobStatus.parse(job) for job in jobs]
    picture, unread, known = None, "", []
    missing: tuple[str, ...] = ()
    try:
        picture = await graph.read(monitor)
    except errors.Refused as refusal:
        unread = str(refusal)
    else:
        folder = discover.working_folder(monitor.pid)
        known = await disks.read(monitor, picture, folder)
        if discover.sees_our_files(monitor.pid):
            missing = _missing(picture, folder or "")
    numbers = version["qemu"]
    return Checkup(
        version=(numbers["major"], numbers["minor"], numbers["micro"]),
        package=version["package"].strip(),
        name=name.get("name", ""),
        status=status.get("status", ""),
        target=target.get("arch", ""),
        machine=machine.removesuffix("-machine"),
        accel=accel,
        capabilities=_capabilities(schema),
        picture=picture,
        disks=tuple(known),
        io_status=_io_status(picture, known),
        jobs=tuple(statuses),
        block_jobs=tuple(block_jobs),
        runs=tuple(runs.parse(picture or graph.parse((), (), None), statuses)),
        exports=tuple(exports),
        iothreads=tuple(thread["id"] for thread in iothreads),
        objects=tuple(object_["name"] for object_ in objects if object_["name"] != "type"),
        missing=missing,
        unread=unread,
    )


def without_secrets(text: str) -> str:
    """A text that can be shown to anybody: what looks like a secret is replaced by ``***``.

    Names and passwords in URLs, what is behind the ``?`` of a web address, and passwords, cookies
    and the like in ``json:{...}``.
    """
    text = _SECRET_MEMBER.sub(r'\1"***"', text)
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


@attrs.frozen
class _Look:
    """Asks what a QEMU, or a storage daemon, may not know."""

    monitor: Monitor
    schema: Schema

    async def ask(self, command: str, otherwise: Any, **arguments: str) -> Any:
        if not self.schema.has_command(command):
            return otherwise
        try:
            return await self.monitor.execute(command, arguments)
        except errors.CommandFailed:
            return otherwise

    async def accelerator(self) -> str:
        found = await self.ask("query-accelerators", {})
        if found:
            return str(found["enabled"])
        kvm = await self.ask("query-kvm", {})
        if not kvm:
            return ""
        return "kvm" if kvm["enabled"] else "not kvm (most likely tcg)"


def _capabilities(schema: Schema) -> dict[str, bool]:
    return {
        f"{command} {argument}".strip(): schema.has_argument(command, argument)
        if argument
        else schema.has_command(command)
        for command, argument in _CAPABILITIES
    }


def _missing(picture: Graph, folder: str) -> tuple[str, ...]:
    files = (node.name for node in picture.nodes.values() if node.driver == "file")
    paths = dict.fromkeys(os.path.join(folder, picture.path(name)) for name in files)
    # QEMU itself deletes the files of -snapshot at once.
    return tuple(
        path for path in paths if not (os.path.lexists(path) or _TEMPORARY.fullmatch(path))
    )


def _io_status(picture: Graph | None, known: list[Disk]) -> dict[str, str]:
    """By disk, where the device reports one."""
    drives = picture.drives if picture else ()
    status = {drive.get("qdev", ""): drive.get("io-status", "") for drive in drives}
    told = {disk.name: status.get(disk.qom_path, "") for disk in known if disk.qom_path}
    return {name: word for name, word in told.items() if word}


def _is_ours(node: str) -> bool:
    return names.parse_node(node) is not None
