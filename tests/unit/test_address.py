# SPDX-License-Identifier: MIT
"""Every form of DOMAIN, and every sentence that says what is wrong with one."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from qmpmirror import address
from qmpmirror.discover import Endpoint
from qmpmirror.errors import AmbiguousDomain, NoSuchMonitor, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Start(Protocol):
    """Starts something that looks like a QEMU of a name, and has some more options."""

    def __call__(self, name: str, *options: str) -> int: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def run(name: str, *options: str) -> int:
            process = subprocess.Popen(
                ["qemu-system-x86_64", "-c", "echo; read -r line", "-name", name, *options],
                executable="/bin/sh",
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            stack.enter_context(process)
            stack.callback(process.stdin.close)
            process.stdout.readline()
            return process.pid

        yield run


@pytest.fixture
def name() -> str:
    """A name that no other QEMU of this host has."""
    return f"vm{secrets.token_hex(8)}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket ``qmp.sock`` in the working folder."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp.sock"))
        server.listen()
        yield server


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "text",
    ["{folder}/qmp.sock", "./qmp.sock", "qmp.sock", "unix:{folder}/qmp.sock", "unix:qmp.sock"],
)
def test_a_socket(tmp_path: Path, text: str) -> None:
    text = text.format(folder=tmp_path)
    domain = address.resolve(text)
    assert domain.text == text
    assert domain.endpoints == (Endpoint.unix(str(tmp_path / "qmp.sock")),)
    assert domain.pid is None


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:4444", "localhost", 4444),
        ("192.0.2.7:1", "192.0.2.7", 1),
        ("host.example.org:65535", "host.example.org", 65535),
        (":4444", "localhost", 4444),
        ("[::1]:4444", "::1", 4444),
        ("[]:4444", "localhost", 4444),
        ("tcp:localhost:4444", "localhost", 4444),
        ("tcp::4444", "localhost", 4444),
        ("tcp:[::1]:4444", "::1", 4444),
        ("1234:4444", "1234", 4444),
    ],
)
def test_a_port(text: str, host: str, port: int) -> None:
    domain = address.resolve(text)
    assert (domain.endpoints, domain.pid) == ((Endpoint.tcp(host, port),), None)


def test_a_name(start: Start, tmp_path: Path, name: str) -> None:
    pid = start(name, "-qmp", "unix:qmp.sock,server=on,wait=off")
    domain = address.resolve(name)
    assert domain.endpoints == (Endpoint.unix(str(tmp_path / "qmp.sock")),)
    assert (domain.text, domain.pid) == (name, pid)


def test_a_pid(start: Start, name: str) -> None:
    pid = start(name, "-qmp", "tcp::4444,server=on")
    domain = address.resolve(str(pid))
    assert (domain.endpoints, domain.pid) == ((Endpoint.tcp("localhost", 4444),), pid)


def test_a_name_that_looks_like_a_pid(start: Start) -> None:
    number = str(10**9 + secrets.randbelow(10**9))
    pid = start(number, "-qmp", "tcp::4444,server=on")
    assert address.resolve(number).pid == pid


def test_a_name_comes_before_a_file(
    start: Start, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    pid = start(name, "-qmp", "tcp::4444,server=on")
    assert address.resolve(name).pid == pid


def test_a_monitor_that_is_free_comes_first(
    start: Start, name: str, tmp_path: Path, server: socket.socket
) -> None:
    start(name, "-qmp", "unix:qmp.sock,server=on", "-qmp", "unix:other.sock,server=on")
    first, other = (Endpoint.unix(str(tmp_path / file)) for file in ("qmp.sock", "other.sock"))
    assert address.resolve(name).endpoints == (first, other)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.getsockname())
        served, _ = server.accept()
        with served:
            assert address.resolve(name).endpoints == (other, first)


# --- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the domain is empty: give a QMP socket, HOST:PORT, a name or a pid"),
        ("a\0b", r"domain 'a\x00b' has a NUL character in it"),
        ("/run/\0", r"domain '/run/\x00' has a NUL character in it"),
        (
            "ssh://host/vm.sock",
            "domain 'ssh://host/vm.sock': connecting by ssh:// is not supported yet: host/vm.sock",
        ),
        ("unix:", "domain 'unix:' names no socket: write unix:PATH"),
        ("tcp:", "domain 'tcp:' is not HOST:PORT with a port from 1 to 65535"),
        ("tcp:host", "domain 'tcp:host' is not HOST:PORT with a port from 1 to 65535"),
        ("tcp:host:", "domain 'tcp:host:' is not HOST:PORT with a port from 1 to 65535"),
        ("tcp:host:qmp", "domain 'tcp:host:qmp' is not HOST:PORT with a port from 1 to 65535"),
        ("tcp:::1:44", "domain 'tcp:::1:44' is not HOST:PORT with a port from 1 to 65535"),
        ("host:0", "domain 'host:0' is not HOST:PORT with a port from 1 to 65535"),
        ("host:65536", "domain 'host:65536' is not HOST:PORT with a port from 1 to 65535"),
        ("tcp:host:99999", "domain 'tcp:host:99999' is not HOST:PORT with a port from 1 to 65535"),
    ],
)
def test_what_can_never_work(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        address.resolve(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{folder}/none", "{folder}/none: No such file or directory"),
        ("unix:{folder}/none", "{folder}/none: No such file or directory"),
        ("unix:none", "none: No such file or directory"),
        ("{folder}/file/none", "{folder}/file/none: Not a directory"),
        ("{folder}", "{folder} is not a socket"),
        ("{folder}/file", "{folder}/file is not a socket"),
        ("./file", "./file is not a socket"),
        ("file", "file is not a socket"),
    ],
)
def test_no_such_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    text = text.format(folder=tmp_path)
    with pytest.raises(NoSuchMonitor) as caught:
        address.resolve(text)
    assert str(caught.value) == sentence.format(folder=tmp_path)
    assert caught.value.address == text


@pytest.mark.parametrize("form", ["{}", "{}:", "{}:port", "{}:123456", "::{}:44"])
def test_no_such_name(name: str, form: str) -> None:
    text = form.format(name)
    with pytest.raises(NoSuchMonitor) as caught:
        address.resolve(text)
    assert caught.value.description == f"no QEMU named {text!r} runs here"
    hint = "a name is what -name gave it; a socket, HOST:PORT or a pid works as well"
    assert (caught.value.hint, caught.value.address) == (hint, text)


def test_a_process_that_is_no_qemu() -> None:
    pid = str(os.getpid())
    with pytest.raises(NoSuchMonitor) as caught:
        address.resolve(pid)
    assert str(caught.value) == f"no QEMU runs here as process {pid}"
    assert caught.value.address == pid


def test_a_qemu_without_a_qmp_socket(start: Start, name: str) -> None:
    pid = start(name, "-monitor", "stdio")
    for text in (name, str(pid)):
        with pytest.raises(NoSuchMonitor) as caught:
            address.resolve(text)
        assert caught.value.description == f"QEMU {name} (pid {pid}) has no QMP socket"
        assert caught.value.hint == "start it with -qmp unix:PATH,server=on,wait=off"
        assert caught.value.address == text


def test_two_qemus_of_one_name(start: Start, name: str, tmp_path: Path) -> None:
    one = start(name, "-qmp", "tcp::4444,server=on")
    other = start(name, "-qmp", "unix:b,server=on")
    with pytest.raises(AmbiguousDomain) as caught:
        address.resolve(name)
    candidates = {
        f"{name} (pid {one}, localhost:4444)",
        f"{name} (pid {other}, {tmp_path}/b)",
    }
    assert set(caught.value.candidates) == candidates
    listed = "; ".join(caught.value.candidates)
    assert str(caught.value) == f"2 QEMUs are named {name!r}: {listed}: give a pid"
    assert caught.value.address == name
