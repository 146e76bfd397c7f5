# SPDX-License-Identifier: MIT
"""What a copy can be sent to: NBD servers of several kinds, TLS, and loop devices."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from qmpmirror.testing.process import Process, sibling

if TYPE_CHECKING:
    from collections.abc import Iterator

LOSETUP = "/usr/sbin/losetup"

needs_nbdkit = pytest.mark.skipif(
    shutil.which("nbdkit") is None, reason="NOT TESTED: nbdkit is not installed"
)
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="NOT TESTED: openssl makes the certificates"
)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@attrs.define(kw_only=True, eq=False)
class Nbdkit(Process):
    """An ``nbdkit`` on a unix socket.

    Attributes:
        arguments: filters and options, the plugin, and its parameters.
    """

    arguments: tuple[str, ...]

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        words = ["nbdkit", "--foreground", f"--pidfile={self._path('pid')}"]
        return [*words, f"--unix={self.socket}", *self.arguments]

    @property
    def socket(self) -> Path:
        """The socket it listens on."""
        return self._socket("nbd")

    @property
    def uri(self) -> str:
        """The export as an NBD URI."""
        return f"nbd+unix:///?socket={self.socket}"

    def _answers(self) -> bool:
        return self._path("pid").exists()


@attrs.define(kw_only=True, eq=False)
class TcpServer(Process):
    """A ``qemu-nbd`` with the export ``disk`` on a TCP port of loopback.

    Attributes:
        qemu: the QEMU whose ``qemu-nbd`` is used.
        image: what it serves.
        creds: the folder with the server's certificates: it wants TLS then.
        host: its address.
        port: the port.
    """

    qemu: str
    image: Path
    creds: Path | None = None
    host: str = "127.0.0.1"
    port: int = attrs.field(factory=free_port)

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        words = [sibling(self.qemu, "qemu-nbd"), "-t", "-f", "raw", "-x", "disk"]
        words += ["-b", self.host, "-p", str(self.port), f"--pid-file={self._path('pid')}"]
        if self.creds is not None:
            tls = f"tls-creds-x509,id=t,endpoint=server,dir={self.creds},verify-peer=on"
            words += ["--object", tls, "--tls-creds", "t"]
        return [*words, str(self.image)]

    @property
    def uri(self) -> str:
        """The export as an NBD URI."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/disk"

    def _answers(self) -> bool:
        return self._path("pid").exists()


def certificates(folder: Path) -> None:
    """A CA, and a server and a client that it vouches for, by openssl."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    folder.mkdir()
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca"),
        *("-keyout", "ca-key.pem", "-out", "ca-cert.pem"),
    )
    for who in ("server", "client"):
        key, request, cert = (f"{who}-{part}.pem" for part in ("key", "request", "cert"))
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", request),
        )
        (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl(
            *("x509", "-req", "-in", request, "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
            *("-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", cert),
        )


@contextlib.contextmanager
def loop_device(file: Path, size: int) -> Iterator[Path]:
    """A loop device over a new sparse file of so many bytes."""
    with file.open("wb") as backing:
        backing.truncate(size)
    run = subprocess.run(
        [LOSETUP, "--find", "--show", str(file)], capture_output=True, check=False, text=True
    )
    if run.returncode:
        pytest.skip(f"NOT TESTED: no loop device to be had here: {run.stderr.strip()}")
    device = run.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run([LOSETUP, "--detach", device], check=True)
