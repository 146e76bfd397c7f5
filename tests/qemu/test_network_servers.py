# SPDX-License-Identifier: MIT
"""Copies to real NBD servers on loopback: nbdkit, another QEMU, and a storage daemon.

``qemu-nbd`` is in `tests.qemu.test_nbd_destinations`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import Phase, errors
from qmpmirror.testing import NbdServer, StorageDaemon
from qmpmirror.testing.process import sibling
from tests.qemu.servers import Nbdkit, needs_nbdkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing.launcher import MonitoredProcess, Qemu
    from qmpmirror.testing.process import Process
    from tests.qemu.conftest import Boot, Connect, Guest, Layers, Unchanged

    Served = Callable[..., "Server"]

SIZE = 8 << 20
SPARSE = 64 << 20
SERVERS = [
    "qemu-nbd",
    "another QEMU",
    "storage daemon",
    pytest.param("nbdkit", marks=needs_nbdkit),
    pytest.param("nbdkit without zeroes", marks=needs_nbdkit),
]


@attrs.frozen
class Server:
    """A server under way.

    Attributes:
        process: to stop or kill.
        uri: its export.
        image: the raw image behind it.
    """

    process: Process
    uri: str
    image: Path


def export(process: MonitoredProcess, socket: Path, image: Path, *, writable: bool) -> None:
    """Let a QEMU or a storage daemon serve an image, by the newest command that it has."""
    node = {"driver": "file", "node-name": "served", "filename": str(image), "discard": "unmap"}
    process.execute("blockdev-add", node)
    process.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    known = {command["name"] for command in process.execute("query-commands")}
    options = {"name": "disk", "writable": writable}
    if "block-export-add" in known:
        more = {"type": "nbd", "id": "export", "node-name": "served", **options}
        process.execute("block-export-add", more)
    else:
        process.execute("nbd-server-add", {"device": "served", **options})


@pytest.fixture
def serve(layers: Layers, tmp_path: Path, boot: Boot, qemu_binary: str) -> Iterator[Served]:
    """Start a server of a kind, with an empty raw image of some size."""
    with contextlib.ExitStack() as started:

        def start(kind: str, size: int = SIZE, *, writable: bool = True) -> Server:
            folder = tmp_path / "server"
            image = folder / "served"
            folder.mkdir()
            layers.images.create(image, size, fmt="raw")
            socket = tmp_path / "nbd"
            uri = f"nbd+unix:///disk?socket={socket}"
            read_only = () if writable else ("--read-only",)
            if kind == "qemu-nbd":
                words = ("--discard=unmap", *read_only)
                nbd = NbdServer(directory=folder, image=image, qemu=qemu_binary, arguments=words)
                started.enter_context(nbd)
                return Server(nbd, nbd.uri, image)
            if kind.startswith("nbdkit"):
                filters = () if kind == "nbdkit" else ("--filter=nozero",)
                words = (*filters, *read_only, "file", str(image))
                kit = Nbdkit(directory=folder, arguments=words)
                started.enter_context(kit)
                return Server(kit, kit.uri, image)
            if kind == "another QEMU":
                process: MonitoredProcess = boot(machine="none")
            else:
                daemon = sibling(qemu_binary, "qemu-storage-daemon")
                process = StorageDaemon(directory=folder, binary=daemon)
                started.enter_context(process)
            export(process, socket, image, writable=writable)
            return Server(process, uri, image)

        yield start


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


@pytest.mark.parametrize("ending", ["pivot", "finish"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_full_copy(
    vm: Qemu, connect: Connect, serve: Served, guest: Callable[..., Guest], kind: str, ending: str
) -> None:
    server = serve(kind)
    user = guest(vm)
    user.scribble()
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri)
        user.scribble()
        await copy.ready()
        user.scribble()
        result = await (copy.pivot() if ending == "pivot" else copy.finish())
    assert result.outcome is (Phase.PIVOTED if ending == "pivot" else Phase.FINISHED)
    at_the_end = bytes(user.expected)
    user.scribble()  # after a finish this must not reach the copy any more
    user.check()
    expected = bytes(user.expected) if ending == "pivot" else at_the_end
    vm.stop()
    server.process.stop()
    assert server.image.read_bytes() == expected


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_sparse_disk_arrives_whole(
    boot: Boot, connect: Connect, serve: Served, layers: Layers, kind: str
) -> None:
    """Most of it is zero: a server that has no request for zeroes gets them written out."""
    source = layers.images.create(layers.folder / "source", SPARSE, fmt="raw")
    layers.images.write_pattern(source, 32 << 20, 1 << 20, 0x77, "raw")
    vm = boot("-drive", f"if=virtio,format=raw,file={source}")
    server = serve(kind, SPARSE)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri, overwrite=True)
        await copy.ready()
        await copy.finish()
    server.process.stop()
    layers.images.compare(source, server.image, "raw", "raw")


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_server_that_dies(
    vm: Qemu,
    connect: Connect,
    serve: Served,
    guest: Callable[..., Guest],
    pinned: dict[str, Any],
    kind: str,
) -> None:
    server = serve(kind)
    user = guest(vm)
    async with connect(vm) as machine:
        before = set((await machine.graph()).nodes)
        copy = await machine.blockcopy("vda", server.uri, **pinned)
        user.scribble()
        server.process.kill()
        with contextlib.suppress(qmpmirror.CommandFailed):  # it may have failed already
            await copy.set_bandwidth(0)
        reason = r"failed: (Input/output error|Broken pipe|Connection reset|Transport endpoint)"
        with pytest.raises(qmpmirror.JobFailed, match=f"{reason}.*; the guest runs on "):
            await copy.ready()
        assert await machine.jobs() == []
        assert set((await machine.graph()).nodes) == before
    user.scribble()
    user.check()


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_server_that_dies_in_the_mirroring_phase(
    vm: Qemu, connect: Connect, serve: Served, guest: Callable[..., Guest], kind: str
) -> None:
    server = serve(kind)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", server.uri)
        await copy.ready()
        server.process.kill()
        user.scribble()
        with pytest.raises(qmpmirror.Error, match=r"error|Broken pipe|reset|endpoint"):
            await copy.pivot()
        assert await machine.jobs() == []
        (disk,) = [disk for disk in await machine.disks() if disk.target == "vda"]
        assert disk.path.endswith("snap2.qcow2")
    user.scribble()
    user.check()


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_read_only_export_is_refused(
    vm: Qemu, connect: Connect, serve: Served, layers: Layers, unchanged: Unchanged, kind: str
) -> None:
    server = serve(kind, writable=False)
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.DestinationError, match=r"read-only|read only") as error:
                await machine.blockcopy("vda", server.uri)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["qemu-nbd", "another QEMU", "storage daemon"])
async def test_an_unknown_export_is_refused(
    vm: Qemu, connect: Connect, serve: Served, layers: Layers, unchanged: Unchanged, kind: str
) -> None:
    """nbdkit serves its one disk under any name."""
    uri = serve(kind).uri.replace("///", "///nonsense").replace("nonsensedisk", "nonsense")
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            reason = "not available|not found|not present|No such"
            with pytest.raises(errors.DestinationError, match=reason) as error:
                await machine.blockcopy("vda", uri)
    assert "\n" not in str(error.value)
