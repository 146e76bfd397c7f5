# SPDX-License-Identifier: MIT
"""DOMAIN as people type it, and QEMUs that are hard to find or to reach."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.testing import Qemu
    from qmpmirror.testing.plugin import QemuFactory
    from tests.qemu.conftest import Cli, Layers

    Prepare = Callable[..., Qemu]

DEADLINE = 60
LISTENS = "00010000"
"""Flags of a listening socket in ``/proc/net/unix``."""


@pytest.fixture
def prepare(qemu: QemuFactory, layers: Layers) -> Prepare:
    """Make a QEMU with one disk and a name that no other one has; it is not started yet."""

    def make(*arguments: str, **options: Any) -> Qemu:
        name = f"address-{os.urandom(6).hex()}"
        drive = ("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")
        return qemu(*drive, *arguments, **{"machine": "pc", "name": name, **options})

    return make


@pytest.fixture
def finds(cli: Cli, layers: Layers) -> Callable[..., None]:
    """Assert that a DOMAIN leads to the QEMU that has the disk."""

    def check(domain: object, **options: Any) -> None:
        ran = cli("domblklist", str(domain), **options)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert f" vda      {layers.snap2}\n" in ran.stdout

    return check


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def take(stack: contextlib.ExitStack, path: Path | str) -> socket.socket:
    """Be the one client of a monitor."""
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.settimeout(DEADLINE)
    client.connect(str(path))
    assert client.recv(65536).startswith(b'{"QMP"')
    return client


def sockets_on(path: Path) -> list[str]:
    """The flags of the listener on a path, and of its clients, waiting ones included."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line.split()[3] for line in lines if line.endswith(f" {path}")]


def clients(path: Path) -> int:
    return len([flags for flags in sockets_on(path) if flags != LISTENS])


def begin(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "qmpmirror", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_form_of_an_address(prepare: Prepare, finds: Callable[..., None]) -> None:
    vm = prepare("-qmp", "tcp:127.0.0.1:0,server=on,wait=off").start()
    listeners = " ".join(chardev["filename"] for chardev in vm.execute("query-chardev"))
    found = re.search(r"tcp:127\.0\.0\.1:(\d+)", listeners)
    assert found is not None
    for address in (
        vm.qmp,
        f"unix:{vm.qmp}",
        f"127.0.0.1:{found[1]}",
        f"tcp:127.0.0.1:{found[1]}",
        f"tcp:localhost:{found[1]}",
    ):
        finds(address)
    source = str(Path(__file__).parents[2])
    for address in (f"./{vm.qmp.name}", f"unix:{vm.qmp.name}", vm.qmp.name):
        finds(address, cwd=vm.qmp.parent, env={**os.environ, "PYTHONPATH": source})


def test_name_and_pid(prepare: Prepare, finds: Callable[..., None]) -> None:
    vm = prepare().start()
    finds(vm.name)
    finds(vm.pid)


@pytest.mark.parametrize(
    "spelling",
    [
        "-chardev socket,path={path},server=on,wait=off,id=c0 -mon c0,mode=control",
        "-mon chardev=c0,mode=control -chardev socket,id=c0,path={path},server=on,wait=off",
        "-chardev socket,id=c,path={path},abstract=on,server=on,wait=off -mon c,mode=control",
        "-chardev socket,id=c,path={path},server=on,wait=off -mon c,mode=control,pretty=on",
        "-qmp-pretty unix:{path},server,nowait",
        "--qmp unix:path={path},server=on,wait=off",
    ],
)
def test_monitor_is_found_however_it_is_spelled(
    prepare: Prepare, finds: Callable[..., None], tmp_path: Path, spelling: str
) -> None:
    vm = prepare(*spelling.format(path=tmp_path / "another").split()).start()
    with contextlib.ExitStack() as stack:
        take(stack, vm.qmp)
        take(stack, vm._harness)
        finds(vm.name)


def test_free_monitor_is_used_when_the_first_is_taken(
    prepare: Prepare, finds: Callable[..., None]
) -> None:
    vm = prepare(qmp_sockets=2).start()
    with contextlib.ExitStack() as stack:
        take(stack, vm.sockets[0])
        finds(vm.name)
        finds(vm.pid)
        take(stack, vm._harness)
        finds(vm.name)


def test_all_monitors_taken(prepare: Prepare, cli: Cli) -> None:
    vm = prepare(qmp_sockets=2).start()
    sockets = [*vm.sockets, vm._harness]
    with contextlib.ExitStack() as stack:
        for path in sockets:
            take(stack, path)
        ran = cli("domblklist", vm.name, "--connect-timeout", "1")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith("error: no QMP greeting from ")
    assert "within 1 s: another client holds this monitor" in ran.stderr
    assert all(str(path) in ran.stderr for path in sockets)
    assert vm.running


def test_monitor_that_becomes_free_in_time(prepare: Prepare, layers: Layers) -> None:
    vm = prepare().start()
    with contextlib.ExitStack() as stack:
        client = take(stack, vm.qmp)
        program = begin("domblklist", vm.qmp, "--connect-timeout", "60")
        until(lambda: clients(vm.qmp) > 1)
        client.close()
        stdout, stderr = program.communicate(timeout=DEADLINE)
    assert (program.returncode, stderr) == (0, "")
    assert f" vda      {layers.snap2}\n" in stdout


@pytest.mark.parametrize(
    "script",
    [
        'exec timeout --foreground 300 {qemu} "$@"',
        "{qemu} \"$@\" & trap 'kill $!' TERM; wait; wait",
        'exec env A=b nice {qemu} "$@"',
    ],
    ids=["timeout", "shell", "nice"],
)
def test_qemu_that_another_program_has_started(
    prepare: Prepare,
    qemu_binary: str,
    tmp_path: Path,
    cli: Cli,
    finds: Callable[..., None],
    script: str,
) -> None:
    program = tmp_path / "start"
    program.write_text(f"#!/bin/sh\n{script.format(qemu=qemu_binary)}\n")
    program.chmod(0o755)
    vm = prepare(binary=program).start()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(vm.stop)
        stack.callback(vm.execute, "quit")
        finds(vm.name)
        children = Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()
        finds(children[0] if children else vm.pid)
        if children:
            ran = cli("domblklist", str(vm.pid))
            assert (ran.returncode, ran.stdout) == (3, "")
            assert f"no QEMU runs here as process {vm.pid}" in ran.stderr


@pytest.mark.parametrize("by_name", [True, False])
def test_qemu_whose_main_loop_starts_late(
    prepare: Prepare, layers: Layers, *, by_name: bool
) -> None:
    vm = prepare()
    starting = threading.Thread(target=vm.start)
    starting.start()
    try:
        # Found by its name, it may not listen anywhere yet.
        until(vm.qmp.exists if by_name else lambda: LISTENS in sockets_on(vm.qmp))
        os.kill(vm.pid, signal.SIGSTOP)
        domain = vm.name if by_name else vm.qmp
        assert domain is not None
        program = begin("domblklist", domain, "--connect-timeout", "60")
        time.sleep(1)
    finally:
        os.kill(vm.pid, signal.SIGCONT)
        stdout, stderr = program.communicate(timeout=DEADLINE)
        starting.join()
    assert (program.returncode, stderr) == (0, "")
    assert f" vda      {layers.snap2}\n" in stdout


def test_qemu_whose_sockets_come_late(prepare: Prepare, layers: Layers) -> None:
    vm = prepare().start()
    sockets = [vm.qmp, vm._harness]
    for path in sockets:
        path.rename(f"{path}.later")
    program = begin("domblklist", str(vm.name), "--connect-timeout", "60")
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(1)
    for path in sockets:
        Path(f"{path}.later").rename(path)
    stdout, stderr = program.communicate(timeout=DEADLINE)
    assert (program.returncode, stderr) == (0, "")
    assert f" vda      {layers.snap2}\n" in stdout


def test_qemu_that_hangs(prepare: Prepare, cli: Cli) -> None:
    vm = prepare().start()
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        ran = cli("domblklist", str(vm.qmp), "--connect-timeout", "0.5")
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == (
        f"error: no QMP greeting from {vm.qmp} within 0.5 s, though no other client is there"
        " (its QEMU hangs, or it is no QMP monitor)\n"
    )


def test_socket_that_a_dead_qemu_has_left(prepare: Prepare, cli: Cli) -> None:
    vm = prepare().start()
    vm.kill()
    ran = cli("domblklist", str(vm.qmp))
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == f"error: nobody listens on {vm.qmp}: Connection refused\n"
    ran = cli("domblklist", str(vm.name))
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith(f"error: no QEMU named {vm.name!r} runs here")


def test_a_socket_that_another_qemu_has_taken_away_is_not_its_own(
    prepare: Prepare, qemu: QemuFactory, cli: Cli, finds: Callable[..., None]
) -> None:
    """Two command lines with one socket path: a name must never lead to the other guest."""
    first = prepare()
    first.start()
    steal = [("-qmp", f"unix:{path},server=on,wait=off") for path in (first.qmp, first._harness)]
    qemu(*steal[0], name="address-thief").start()
    finds(first.name)  # it has another monitor
    thief = qemu(*steal[0], *steal[1], name="address-thief")
    thief.start()
    for domain in (first.name, str(first.pid)):
        run = cli("domblklist", domain, "--connect-timeout", "1")
        assert (run.returncode, run.stdout) == (3, "")
        owner = f"is the monitor of the QEMU with pid {thief.pid} now, not of {domain}"
        assert owner in run.stderr
    # Who gives the socket means whoever is behind it.
    assert cli("domblklist", str(first.qmp)).returncode == 0
