# SPDX-License-Identifier: MIT
"""Real sockets and processes of this host, as `discover` sees them."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from qmpmirror import discover
from qmpmirror.discover import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

X86 = "qemu-system-x86_64"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listen(stack: ExitStack, name: str) -> socket.socket:
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(name)
    server.listen()
    return server


def connect(stack: ExitStack, name: str) -> socket.socket:
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(name)
    return client


def take(stack: ExitStack, name: str) -> None:
    """Listen at a name and serve one client."""
    server = listen(stack, name)
    connect(stack, name)
    stack.enter_context(server.accept()[0])


def test_a_socket_is_taken_while_a_client_is_served(stack: ExitStack, folder: Path) -> None:
    path = str(folder / "qmp.sock")
    endpoint = Endpoint.unix(path)
    assert not discover.is_taken(endpoint)
    server = listen(stack, path)
    assert not discover.is_taken(endpoint)
    client = connect(stack, path)
    assert not discover.is_taken(endpoint), "it is queued, and nobody serves it"
    served, _ = server.accept()
    assert discover.is_taken(endpoint)
    client.close()
    served.close()
    assert not discover.is_taken(endpoint)


def test_another_socket_is_not_taken(stack: ExitStack, folder: Path) -> None:
    take(stack, str(folder / "a.sock"))
    listen(stack, str(folder / "b.sock"))
    assert discover.is_taken(Endpoint.unix(str(folder / "a.sock")))
    assert not discover.is_taken(Endpoint.unix(str(folder / "b.sock")))


def test_a_path_with_a_blank(stack: ExitStack, folder: Path) -> None:
    take(stack, str(folder / "two  words.sock"))
    assert discover.is_taken(Endpoint.unix(str(folder / "two  words.sock")))


@pytest.mark.parametrize("name", ["qmp.sock", "./qmp.sock", "sub/../qmp.sock", "sub/qmp.sock"])
def test_a_socket_bound_by_a_relative_path(stack: ExitStack, folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    take(stack, name)
    assert discover.is_taken(Endpoint.unix(str(folder / os.path.normpath(name))))


def test_the_same_relative_path_in_two_folders(
    stack: ExitStack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each virtual machine in a folder of its own, and all command lines alike."""
    (folder / "other").mkdir()
    take(stack, "qmp.sock")
    assert discover.is_taken(Endpoint.unix(str(folder / "qmp.sock")))
    assert not discover.is_taken(Endpoint.unix(str(folder / "other" / "qmp.sock")))
    monkeypatch.chdir("/")


def test_a_relative_socket_of_a_process_that_we_may_not_look_at(
    stack: ExitStack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better one warning too many than one too few."""
    (folder / "sub").mkdir()
    take(stack, "sub/qmp.sock")
    monkeypatch.setattr(discover, "iglob", lambda _pattern: iter(()))
    assert discover.is_taken(Endpoint.unix(str(folder / "sub" / "qmp.sock")))
    assert discover.is_taken(Endpoint.unix("/elsewhere/sub/qmp.sock"))
    assert not discover.is_taken(Endpoint.unix(str(folder / "qmp.sock")))


def test_a_socket_in_a_linked_folder(stack: ExitStack, folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    take(stack, str(folder / "real" / "qmp.sock"))
    assert discover.is_taken(Endpoint.unix(str(folder / "link" / "qmp.sock")))


def test_an_abstract_socket(stack: ExitStack) -> None:
    name = secrets.token_hex(8)
    take(stack, f"\0{name}")
    assert discover.is_taken(Endpoint.unix(f"@{name}"))
    assert not discover.is_taken(Endpoint.unix(name))
    assert not discover.is_taken(Endpoint.unix(f"/{name}"))


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_port(stack: ExitStack, family: socket.AddressFamily, address: str) -> None:
    try:
        server = stack.enter_context(socket.create_server((address, 0), family=family))
    except OSError as error:
        pytest.skip(f"no such network here: {error}")
    endpoint = Endpoint.tcp("localhost", server.getsockname()[1])
    assert not discover.is_taken(endpoint)
    stack.enter_context(socket.create_connection(server.getsockname()[:2]))
    stack.enter_context(server.accept()[0])
    assert discover.is_taken(endpoint)
    free = stack.enter_context(socket.create_server((address, 0), family=family))
    assert not discover.is_taken(Endpoint.tcp("localhost", free.getsockname()[1]))


# --- processes -------------------------------------------------------------------------------


@contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a QEMU to `ps`, and is a shell."""
    words = [X86, "-c", "echo; read -r line", *arguments]
    process = subprocess.Popen(
        words,
        executable="/bin/sh",
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_a_running_qemu_is_found(tmp_path: Path) -> None:
    name = secrets.token_hex(8)
    options = ["-name", f"guest={name},debug-threads=on", "-qmp", "unix:qmp.sock,server=on"]
    with running(*options, cwd=tmp_path) as process:
        (found,) = (each for each in discover.processes() if each.pid == process.pid)
        assert found.name == name
        assert found.program == X86
        assert found.endpoints == (Endpoint.unix(str(tmp_path / "qmp.sock")),)
        assert discover.working_folder(process.pid) == str(tmp_path)
        assert discover.sees_our_files(process.pid)
    assert not any(each.pid == process.pid for each in discover.processes())


def test_processes_come_by_pid(tmp_path: Path) -> None:
    with running(cwd=tmp_path) as one, running(cwd=tmp_path) as other:
        pids = [process.pid for process in discover.processes()]
        assert pids == sorted(pids)
        assert {one.pid, other.pid} <= set(pids)
        assert os.getpid() not in pids


def test_nothing_is_known_of_a_process_that_is_not_there(tmp_path: Path) -> None:
    with running(cwd=tmp_path) as process:
        pass
    for pid in (None, process.pid):
        assert discover.working_folder(pid) is None
        assert not discover.sees_our_files(pid)


def test_whether_a_process_has_ended(tmp_path: Path) -> None:
    assert not discover.has_ended(os.getpid())
    with running(cwd=tmp_path) as process:
        assert not discover.has_ended(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert discover.has_ended(process.pid), "it only waits for its parent"
    assert discover.has_ended(process.pid)
