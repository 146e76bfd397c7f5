# SPDX-License-Identifier: MIT
"""Where the two QEMUs of a migration meet: one address for the disks, one for the memory."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from glob import escape as glob_escape
from glob import glob
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror import discover, errors

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor

LOOPBACK: Final = "127.0.0.1"
_FOLDER: Final = "qmpmirror-migrate-"
_SHORT: Final = "/tmp"  # noqa: S108 - the folders in it are private
_LONGEST: Final = 60
"""Bytes of a folder's path that leave room for those of a unix socket in it (107 in all)."""

_TCP: Final = re.compile(r"tcp:(?://)?(?:\[(?P<six>[^]]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")
_UNIX: Final = re.compile(r"unix:(?://)?(?P<path>/.+)")


@attrs.frozen
class Endpoint:
    """An address: a unix socket's path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, uri: str, option: str) -> Endpoint:
        """Understand ``tcp://HOST:PORT`` or ``unix:///PATH``.

        Raises:
            UsageError: it is neither; ``option`` says where it came from.
        """
        if match := _UNIX.fullmatch(uri):
            return cls(path=match["path"])
        match = _TCP.fullmatch(uri)
        if match is None or not 0 < int(match["port"]) < 2**16:
            raise errors.UsageError(f"{option} {uri!r} is no tcp://HOST:PORT and no unix:///PATH")
        return cls(host=match["six"] or match["host"], port=int(match["port"]))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    def flat(self) -> dict[str, str]:
        """As ``blockdev-add`` takes it."""
        if self.path:
            return {"type": "unix", "path": self.path}
        return {"type": "inet", "host": self.host, "port": str(self.port)}

    def nested(self) -> dict[str, Any]:
        """As ``nbd-server-start`` takes it."""
        data = self.flat()
        return {"type": data.pop("type"), "data": data}


@attrs.frozen
class Endpoints:
    """Both addresses.

    Attributes:
        disks: where the destination offers its disks.
        memory: where it waits for the memory.
        folder: the private folder of the sockets; empty if there is none.
    """

    disks: Endpoint
    memory: Endpoint
    folder: str = ""

    def close(self) -> None:
        """Remove the private folder, if any."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def choose(
    group: str,
    source: Monitor,
    destination: Monitor,
    disks_uri: str,
    memory_uri: str,
    *,
    tls: bool,
) -> Endpoints:
    """Both addresses: those that the user gave, else unix sockets, or TCP with TLS.

    Args:
        group: the migration's id.
        source: one side.
        destination: the other one.
        disks_uri: where the disks are to be offered; empty for a choice of ours.
        memory_uri: where the memory is to be waited for; empty likewise.
        tls: whether TLS is wanted.

    Raises:
        UsageError: an address makes no sense, or TLS is to go over a unix socket.
        Refused: the destination is on another host, and nobody has said how to reach it.
    """
    given = {
        option: Endpoint.parse(uri, option)
        for option, uri in (("disks-uri", disks_uri), ("migrateuri", memory_uri))
        if uri
    }
    if tls and any(endpoint.path for endpoint in given.values()):
        raise errors.UsageError("TLS goes over TCP: give tcp://HOST:PORT, or leave that out")
    missing = [option for option in ("disks-uri", "migrateuri") if option not in given]
    here = all(discover.sees_our_files(monitor.pid) for monitor in (source, destination))
    folder = ""
    if missing and not here:
        raise errors.Refused(
            "it is not known how the source reaches the destination: they are not both on this"
            " host, or see other files than this process",
            hint=f"give --{' and --'.join(missing)}",
        )
    if missing and not tls:
        folder = _private_folder(group, destination.pid)
        for option in missing:
            given[option] = Endpoint(path=os.path.join(folder, option))
    elif missing:
        for option, port in zip(missing, _free_ports(len(missing)), strict=True):
            given[option] = Endpoint(host=LOOPBACK, port=port)
    return Endpoints(given["disks-uri"], given["migrateuri"], folder)


def remove_folders(group: str) -> None:
    """Remove the private folder of an interrupted migration, if it is on this host."""
    for parent in {tempfile.gettempdir(), _SHORT}:
        for folder in glob(os.path.join(glob_escape(parent), f"{_FOLDER}{group}-*")):
            shutil.rmtree(folder, ignore_errors=True)


def _private_folder(group: str, pid: int | None) -> str:
    """A folder for the sockets that nobody else can enter; the destination creates them in it."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _LONGEST:
        parent = _SHORT
    folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{group}-", dir=parent)
    owner = os.stat(f"/proc/{pid}").st_uid
    if os.geteuid() == 0 and owner != 0:
        os.chown(folder, owner, -1)
    return folder


def _free_ports(number: int) -> list[int]:
    """TCP ports of loopback that nobody listens on now."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
