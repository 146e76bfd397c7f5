# SPDX-License-Identifier: MIT
"""Getting hold of a monitor: one deadline, and a clear word for each way to fail."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final

from qemu.qmp import ConnectError as ClientConnectError
from qemu.qmp import QMPError, Runstate
from qemu.qmp.error import ProtocolError

from qmpmirror import discover, errors
from qmpmirror.monitor import Client, Monitor, Transcript, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.address import Domain
    from qmpmirror.discover import Endpoint

CONNECT_SECONDS: Final = 10.0
_ATTEMPT_SECONDS: Final = 3.0
_PAUSE_SECONDS: Final = 0.05


class _NotYetError(Exception):
    """An attempt that is worth repeating."""


async def open_monitor(
    domain: Domain,
    *,
    seconds: float = CONNECT_SECONDS,
    transcript: Transcript | None = None,
) -> Monitor:
    """Connect to the first of a domain's monitors that greets us.

    Cancelling this leaves no connection behind.

    Args:
        domain: where to connect.
        seconds: the deadline for a greeting. A monitor serves one client at a time; another one
            is queued and never greeted, which only a deadline can tell.
        transcript: where to write what passes.

    Raises:
        NotListening: nobody is behind the address.
        NotQMP: what answered does not speak QMP.
        MonitorBusy: no greeting came in time.
    """
    end = time.monotonic() + seconds
    while True:
        refusals: list[errors.ConnectError] = []
        for endpoint in domain.endpoints:
            remaining = end - time.monotonic()
            attempt = max(0.01, min(_ATTEMPT_SECONDS, remaining / len(domain.endpoints)))
            # A QEMU that is starting or ending may hang up on us: that is worth another attempt.
            with suppress(_NotYetError):
                try:
                    return await _attempt(endpoint, domain, attempt, transcript)
                except errors.ConnectError as refusal:
                    refusals.append(refusal)
        # One that was found by its name or pid may be starting: it makes its sockets one by one.
        may_start = domain.pid is not None and not discover.has_ended(domain.pid)
        refused = len(refusals) == len(domain.endpoints)
        if refused and not may_start:
            raise refusals[0]
        if time.monotonic() + _PAUSE_SECONDS >= end:
            raise refusals[0] if refused else _busy(domain.endpoints, domain.text, seconds)
        await asyncio.sleep(_PAUSE_SECONDS)


async def _attempt(
    endpoint: Endpoint, domain: Domain, seconds: float, transcript: Transcript | None
) -> Monitor:
    client = Client()
    try:
        async with AsyncExitStack() as undo:
            sock = await _connect(endpoint, domain.text, seconds)
            undo.callback(sock.close)
            undo.push_async_callback(_hang_up, client)
            pid = _peer(sock) if endpoint.path else domain.pid
            _check_owner(endpoint, pid, domain)
            await within(seconds, client.connect(sock))
            undo.pop_all()
    except asyncio.TimeoutError:
        raise _NotYetError from None
    except ClientConnectError as error:
        if _is_foreign(error.exc):
            raise errors.NotQMP(
                f"{endpoint} does not speak QMP: {_root_cause(error.exc)}",
                address=domain.text,
                hint="QMP sockets are those of -qmp, or of -mon with mode=control",
            ) from error
        raise _NotYetError from error
    return Monitor(
        client, address=str(endpoint), pid=pid or domain.pid, owned=True, transcript=transcript
    )


def _check_owner(endpoint: Endpoint, pid: int | None, domain: Domain) -> None:
    """A QEMU that was started with the socket path of another one has taken it away from that."""
    if domain.pid in {None, pid} or pid not in {process.pid for process in discover.processes()}:
        return
    raise errors.NotListening(
        f"{endpoint} is the monitor of the QEMU with pid {pid} now, not of {domain.text}"
        f" (pid {domain.pid})",
        address=domain.text,
        hint="each QEMU needs a socket path of its own",
    )


def _is_foreign(error: BaseException) -> bool:
    """Whether what came is no QMP; half a greeting is: its QEMU has ended in that moment."""
    if not isinstance(error, (ProtocolError, ValueError)):
        return False
    raw = getattr(error.__cause__, "raw", b"")
    return not raw.startswith(b'{"QMP"')


async def _hang_up(client: Client) -> None:
    if client.runstate is not Runstate.IDLE:
        # disconnect() raises whatever ended the connection; here it has ended anyway.
        with suppress(QMPError, OSError, EOFError, ValueError):
            await client.disconnect()


async def _connect(endpoint: Endpoint, text: str, seconds: float) -> socket.socket:
    """A connected socket."""
    try:
        if endpoint.path:
            return _connect_unix(endpoint.path)
        return await within(seconds, _connect_tcp(endpoint.host, endpoint.port))
    except asyncio.TimeoutError:
        raise _NotYetError from None
    except FileNotFoundError:
        raise errors.NoSuchMonitor(f"{endpoint}: no such socket", address=text) from None
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.ETIMEDOUT}:
            raise _NotYetError from None
        raise errors.NotListening(
            f"nobody listens on {endpoint}: {error.strerror or error}", address=text
        ) from None


def _connect_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not by asyncio, which takes the EAGAIN of a full backlog for success.
        sock.setblocking(False)
        sock.connect(f"\0{path[1:]}" if path.startswith("@") else path)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
        else:
            return sock
    raise failure or OSError(errno.EADDRNOTAVAIL, "no address")


def _peer(sock: socket.socket) -> int | None:
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid or None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _busy(endpoints: Sequence[Endpoint], text: str, seconds: float) -> errors.MonitorBusy:
    where = ", ".join(map(str, endpoints))
    here = all(endpoint.path or endpoint.host == "localhost" for endpoint in endpoints)
    if here and not any(map(discover.is_taken, endpoints)):
        return errors.MonitorBusy(
            f"no QMP greeting from {where} within {seconds:g} s, though no other client is there",
            address=text,
            hint="its QEMU hangs, or it is no QMP monitor",
        )
    return errors.MonitorBusy(
        f"no QMP greeting from {where} within {seconds:g} s: another client holds this monitor",
        address=text,
        hint="a QMP monitor serves one client; a second -qmp option gives QEMU another one",
    )
