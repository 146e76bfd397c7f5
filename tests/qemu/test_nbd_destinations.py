# SPDX-License-Identifier: MIT
"""Destinations behind an NBD server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, errors
from qmpmirror.testing.launcher import NbdServer
from qmpmirror.testing.process import sibling
from tests.qemu.servers import TcpServer, certificates, free_port, needs_openssl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Guest, Layers, Unchanged

    MakeGuest = Callable[..., Guest]

SIZE = 8 * 1024 * 1024


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


@pytest.fixture
def serve(layers: Layers, tmp_path: Path) -> Iterator[Callable[..., NbdServer]]:
    started: list[NbdServer] = []

    def start(size: int = SIZE, *arguments: str, **options: Any) -> NbdServer:
        image = tmp_path / f"served{len(started)}"
        layers.images.create(image, size, fmt="raw")
        server = NbdServer(
            image=image,
            qemu=layers.images.qemu,
            directory=tmp_path,
            arguments=arguments,
            **options,
        )
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.mark.parametrize("size", [SIZE, SIZE + 512 * 1024])
@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_copy_to_an_export_as_large_or_larger(
    vm: Qemu,
    connect: Connect,
    serve: Callable[..., NbdServer],
    guest: MakeGuest,
    size: int,
    ending: str,
) -> None:
    server = serve(size)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri)
        await copy.ready()
        user.scribble()
        result = await (copy.pivot() if ending == "pivot" else copy.finish())
        assert result.outcome is (Phase.PIVOTED if ending == "pivot" else Phase.FINISHED)
        user.check()
    vm.stop()
    server.stop()
    check_served(server, bytes(user.expected))


def check_served(server: NbdServer, expected: bytes) -> None:
    served = Path(server.image).read_bytes()
    assert served[:SIZE] == expected
    assert not any(served[SIZE:])


async def test_a_smaller_export_is_refused_with_both_numbers(
    vm: Qemu,
    connect: Connect,
    serve: Callable[..., NbdServer],
    layers: Layers,
    unchanged: Unchanged,
) -> None:
    server = serve(SIZE // 2)
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused, match=f"{SIZE // 2} bytes: too small.*{SIZE} bytes"):
                await machine.blockcopy("vda", server.uri)


async def test_qcow2_on_an_export(
    vm: Qemu, connect: Connect, serve: Callable[..., NbdServer], layers: Layers
) -> None:
    server = serve(2 * SIZE)
    expected = layers.content(layers.snap2)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri, format="qcow2", shallow=True)
        await copy.ready()
        assert (await copy.finish()).outcome is Phase.FINISHED
    server.stop()
    assert layers.content(Path(server.image)) == expected


@pytest.mark.parametrize(
    ("arguments", "export", "reason"),
    [
        (("--read-only",), "", "read-only|read only|Permission denied"),
        ((), "unknown", "not available|not found|not present|No such"),
    ],
)
async def test_unfit_exports_change_nothing(
    vm: Qemu,
    connect: Connect,
    serve: Callable[..., NbdServer],
    layers: Layers,
    unchanged: Unchanged,
    arguments: tuple[str, ...],
    export: str,
    reason: str,
) -> None:
    server = serve(SIZE, *arguments)
    uri = f"nbd+unix:///{export}?socket={server.socket}"
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused, match=reason):
                await machine.blockcopy("vda", uri)


async def test_a_server_that_comes_up_late_is_waited_for(
    vm: Qemu, connect: Connect, layers: Layers, tmp_path: Path
) -> None:
    image = tmp_path / "late"
    layers.images.create(image, SIZE, fmt="raw")
    port = free_port()
    uri = f"nbd://127.0.0.1:{port}/disk"
    async with connect(vm) as machine:
        with pytest.raises(errors.DestinationError, match=r"Connection refused|connect"):
            await machine.blockcopy("vda", uri)
        command = [sibling(layers.images.qemu, "qemu-nbd"), "-t", "-x", "disk", "-f", "raw"]
        servers: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            servers.append(
                subprocess.Popen(
                    [*command, "-b", "127.0.0.1", "-p", str(port), str(image)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )

        threading.Timer(0.7, start).start()
        try:
            copy = await machine.blockcopy("vda", uri, server_seconds=20.0)
            await copy.ready()
            assert (await copy.finish()).outcome is Phase.FINISHED
        finally:
            for server in servers:
                server.kill()
                server.wait()
    assert layers.content(image, "raw") == layers.content(layers.snap2)


async def test_a_server_that_dies_fails_the_copy_and_spares_the_guest(
    vm: Qemu, connect: Connect, serve: Callable[..., NbdServer], guest: MakeGuest, pinned: Any
) -> None:
    server = serve()
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri, **pinned)
        server.kill()
        with contextlib.suppress(qmpmirror.CommandFailed):  # it may have failed already
            await copy.set_bandwidth(0)
        with pytest.raises(qmpmirror.JobFailed, match=r"Input/output error|Broken pipe|reset"):
            await copy.ready()
        assert await machine.jobs() == []
    user.scribble()
    user.check()


@needs_openssl
async def test_tls(vm: Qemu, connect: Connect, layers: Layers, tmp_path: Path) -> None:
    ours, strangers = tmp_path / "ours", tmp_path / "strangers"
    certificates(ours)
    certificates(strangers)
    image = tmp_path / "served"
    layers.images.create(image, SIZE, fmt="raw")
    with TcpServer(qemu=layers.images.qemu, directory=tmp_path, image=image, creds=ours) as server:
        async with connect(vm) as machine:
            before = machine_objects(vm)
            # Without credentials, and with those of somebody else, nothing changes.
            for creds in ("", str(strangers)):
                with pytest.raises(errors.Refused):
                    await machine.blockcopy("vda", server.uri, tls_creds=creds, server_seconds=5.0)
                assert machine_objects(vm) == before
            copy = await machine.blockcopy("vda", server.uri, tls_creds=str(ours))
            await copy.ready()
            assert (await copy.finish()).outcome is Phase.FINISHED
            assert machine_objects(vm) == before
    assert layers.content(image, "raw") == layers.content(layers.snap2)


def machine_objects(vm: Qemu) -> list[str]:
    return [entry["name"] for entry in vm.execute("qom-list", path="/objects")]


def test_json_destination_on_the_command_line(
    vm: Qemu, cli: Cli, serve: Callable[..., NbdServer], layers: Layers
) -> None:
    server = serve()
    options = {"driver": "nbd", "server": {"type": "unix", "path": str(server.socket)}}
    run = cli("blockcopy", vm.qmp, "vda", f"json:{json.dumps(options)}", "--finish")
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n")
    assert layers.content(Path(server.image), "raw") == layers.content(layers.snap2)


@pytest.mark.parametrize(
    ("destination", "reason"),
    [
        ('json:{"driver": "nonsense"}', "has no driver 'nonsense'"),
        ("json:{", "is no JSON"),
        ("json:[]", "names no driver"),
        ("nbd+unix:///x", r"needs \?socket=PATH"),
        ("nbd://:1/x", "names no host"),
    ],
)
async def test_destinations_that_make_no_sense(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged, destination: str, reason: str
) -> None:
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Error, match=reason):
                await machine.blockcopy("vda", destination)
