# SPDX-License-Identifier: MIT
"""What the user typed as DOMAIN, turned into the monitors where it can be reached."""

from __future__ import annotations

import os
import re
import stat
from typing import Final

import attrs

from qmpmirror import discover
from qmpmirror.discover import Endpoint
from qmpmirror.errors import AmbiguousDomain, NoSuchMonitor, UsageError

_HOST_PORT: Final = re.compile(r"(?P<host>\[[^\]]*\]|[^:/\s]*):(?P<port>\d{1,5})")
_MAX_PORT: Final = 65535


@attrs.frozen
class Domain:
    """Where a DOMAIN can be reached.

    Attributes:
        text: what the user typed.
        endpoints: QMP monitors, the likeliest first; never empty.
        pid: the QEMU process, when it was found by name or pid.
    """

    text: str
    endpoints: tuple[Endpoint, ...]
    pid: int | None = None


def resolve(text: str) -> Domain:
    """Find out what ``text`` means.

    It is one of: a path of a unix socket, ``unix:PATH``, ``HOST:PORT``, ``tcp:HOST:PORT``, the
    pid or the ``-name`` of a QEMU that runs on this host.

    Raises:
        UsageError: it is none of these.
        NoSuchMonitor: no such socket, name or pid, or that QEMU has no QMP socket.
        AmbiguousDomain: several QEMUs have this name.
    """
    if not text:
        raise UsageError("the domain is empty: give a QMP socket, HOST:PORT, a name or a pid")
    if "\0" in text:
        raise UsageError(f"domain {text!r} has a NUL character in it")
    scheme, separator, rest = text.partition("://")
    if separator:
        raise UsageError(f"domain {text!r}: connecting by {scheme}:// is not supported yet: {rest}")
    if text.startswith("unix:"):
        return _socket(text, text.removeprefix("unix:"))
    if text.startswith("tcp:"):
        return _host_port(text, text.removeprefix("tcp:"))
    if "/" in text:
        return _socket(text, text)
    if text.isdecimal():
        return _process(text)
    if _HOST_PORT.fullmatch(text):
        return _host_port(text, text)
    return _name(text)


def _socket(text: str, path: str) -> Domain:
    if not path:
        raise UsageError(f"domain {text!r} names no socket: write unix:PATH")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise NoSuchMonitor(f"{path}: {error.strerror}", address=text) from None
    if not stat.S_ISSOCK(mode):
        raise NoSuchMonitor(f"{path} is not a socket", address=text)
    return Domain(text, (Endpoint.unix(os.path.abspath(path)),))


def _host_port(text: str, address: str) -> Domain:
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
        raise UsageError(f"domain {text!r} is not HOST:PORT with a port from 1 to {_MAX_PORT}")
    host = match["host"].strip("[]") or "localhost"
    return Domain(text, (Endpoint.tcp(host, int(match["port"])),))


def _process(text: str) -> Domain:
    for process in discover.processes():
        if process.pid == int(text):
            return _reachable(text, process)
    by_name = [process for process in discover.processes() if process.name == text]
    if len(by_name) == 1:
        return _reachable(text, by_name[0])
    raise NoSuchMonitor(f"no QEMU runs here as process {text}", address=text)


def _name(text: str) -> Domain:
    found = [process for process in discover.processes() if process.name == text]
    if not found and os.path.exists(text):
        return _socket(text, text)
    if not found:
        raise NoSuchMonitor(
            f"no QEMU named {text!r} runs here",
            address=text,
            hint="a name is what -name gave it; a socket, HOST:PORT or a pid works as well",
        )
    if len(found) > 1:
        candidates = [process.describe() for process in found]
        raise AmbiguousDomain(
            f"{len(found)} QEMUs are named {text!r}: {'; '.join(candidates)}: give a pid",
            candidates=candidates,
            address=text,
        )
    return _reachable(text, found[0])


def _reachable(text: str, process: discover.Process) -> Domain:
    if not process.endpoints:
        raise NoSuchMonitor(
            f"QEMU {process.name or process.program} (pid {process.pid}) has no QMP socket",
            address=text,
            hint="start it with -qmp unix:PATH,server=on,wait=off",
        )
    free_first = sorted(process.endpoints, key=discover.is_taken)
    return Domain(text, tuple(free_first), process.pid)
