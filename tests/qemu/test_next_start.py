# SPDX-License-Identifier: MIT
"""A second QEMU takes the words for its command line, and opens the copy wherever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import attrs
import pytest

from qmpmirror.testing import NbdServer
from tests.qemu.servers import TcpServer, certificates, loop_device, needs_openssl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.qemu.conftest import Boot, Connect, Guest, Layers

SIZE = 8 << 20
DEVICE = ("-device", "virtio-blk-pci,drive=fmt0,id=dev0")
SOURCES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "if=virtio": (["-drive", "if=virtio,format=qcow2,file={}"], ()),
    "if=none": (["-drive", "if=none,id=fmt0,format=qcow2,file={}"], DEVICE),
    "blockdev": (
        ["-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"],
        DEVICE,
    ),
}


@attrs.frozen
class Restart:
    """Copies, pivots, ends QEMU, and starts another one with the words of the result."""

    layers: Layers
    boot: Boot
    connect: Connect
    guest: Callable[..., Guest]
    source: str

    async def check(self, destination: Path | str, **options: Any) -> list[str]:
        """The guest's disk must hold the same afterwards; returns the words."""
        disk, device = SOURCES[self.source]
        vm = self.boot(*(word.format(self.layers.snap2) for word in disk), *device)
        user = self.guest(vm)
        async with self.connect(vm) as machine:
            copy = await machine.blockcopy("vda", destination, **options)
            await copy.ready()
            result = await copy.pivot()
        user.scribble()
        vm.stop()
        # The very words, in the place of those that opened the old image.
        second = self.boot(*result.launch, *device)
        (drive,) = second.execute("query-block")
        again = attrs.evolve(user, vm=second, drive=drive)
        again.check()
        again.scribble()
        again.check()
        assert drive["inserted"]["image"]["virtual-size"] == SIZE
        second.stop()
        return list(result.launch)


@pytest.fixture(params=list(SOURCES))
def restart(
    layers: Layers,
    boot: Boot,
    connect: Connect,
    guest: Callable[..., Guest],
    request: pytest.FixtureRequest,
) -> Restart:
    return Restart(layers, boot, connect, guest, request.param)


@pytest.mark.parametrize("name", ["copy", "with space", "comma,,", 'json:{"driver":"null-co"}'])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_files(restart: Restart, layers: Layers, fmt: str, name: str) -> None:
    await restart.check(layers.folder / name, format=fmt)


async def test_data_file(restart: Restart, layers: Layers) -> None:
    creation = {"data_file": str(layers.folder / "data"), "data_file_raw": "on"}
    await restart.check(layers.folder / "copy", creation=creation)


@pytest.mark.parametrize("fmt", ["qcow2", "luks"])
async def test_luks(restart: Restart, layers: Layers, tmp_path: Path, fmt: str) -> None:
    secret = tmp_path / "a secret, kept"
    secret.write_text("a long passphrase")
    # Otherwise each start takes seconds.
    fast = {"encrypt.iter-time" if fmt == "qcow2" else "iter-time": "10"}
    how = {"format": fmt, "secret": str(secret), "creation": fast}
    words = await restart.check(layers.folder / "copy", **how)
    assert "-object" in words


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE], ids=["equal", "larger"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_devices(restart: Restart, tmp_path: Path, fmt: str, size: int) -> None:
    if (fmt, size) == ("qcow2", SIZE):
        size += SIZE // 2  # room for the metadata
    with loop_device(tmp_path / "file", size) as device:
        await restart.check(device, format=fmt)


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE], ids=["equal", "larger"])
@pytest.mark.parametrize("export", ["", "a disk, at 50%20"])
async def test_exports(
    restart: Restart, layers: Layers, tmp_path: Path, export: str, size: int
) -> None:
    image = layers.images.create(tmp_path / "served", size, fmt="raw")
    with NbdServer(
        directory=tmp_path, image=image, qemu=layers.images.qemu, export=export
    ) as server:
        await restart.check(f"nbd+unix:///{quote(export)}?socket={server.socket}")


async def test_export_on_ipv6(restart: Restart, layers: Layers, tmp_path: Path) -> None:
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    with TcpServer(directory=tmp_path, qemu=layers.images.qemu, image=image, host="::1") as server:
        await restart.check(server.uri)


async def test_qcow2_on_an_export(restart: Restart, layers: Layers, tmp_path: Path) -> None:
    image = layers.images.create(tmp_path / "served", 2 * SIZE, fmt="raw")
    with NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu) as server:
        await restart.check(server.uri, format="qcow2")


@needs_openssl
async def test_exports_with_tls(restart: Restart, layers: Layers, tmp_path: Path) -> None:
    creds = tmp_path / "creds, of ours"
    certificates(creds)
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    with TcpServer(
        directory=tmp_path, qemu=layers.images.qemu, image=image, creds=_plain(creds)
    ) as server:
        words = await restart.check(server.uri, tls_creds=str(creds))
    assert "-object" in words


def _plain(creds: Path) -> Path:
    """The same folder under a name that needs no escaping."""
    link = creds.parent / "server-creds"
    link.symlink_to(creds)
    return link


STARTED: dict[str, tuple[list[str], list[str]]] = {
    "drive": (
        ["-drive", "if=none,id=d0,format=qcow2,cache=none,discard=unmap,werror=enospc,file={}"],
        ["id=d0", "cache=none", "discard=unmap", "werror=enospc"],
    ),
    "blockdev": (
        [
            *("-blockdev", "file,node-name=f0,filename={},cache.direct=on,aio=threads,locking=on"),
            *("-blockdev", "qcow2,node-name=d0,file=f0,discard=unmap"),
        ],
        ['"node-name": "d0"', '"discard": "unmap"', '"aio": "threads"', '"locking": "on"'],
    ),
    "one blockdev below a filter": (
        [
            *("-object", "throttle-group,id=tg"),
            *("-blockdev", "qcow2,node-name=q0,discard=unmap,file.driver=file,file.filename={}"),
            *("-blockdev", "throttle,node-name=d0,throttle-group=tg,file=q0"),
        ],
        ['"node-name": "q0"', '"discard": "unmap"'],
    ),
}


@pytest.mark.parametrize("how", list(STARTED))
async def test_the_words_of_the_first_start_go_on(
    layers: Layers, boot: Boot, connect: Connect, guest: Callable[..., Guest], how: str
) -> None:
    """Also after a second pivot, when QEMU itself knows nothing of the names any more."""
    first, expected = STARTED[how]
    device = ("-device", "virtio-blk-pci,drive=d0,id=dev0")
    vm = boot(*(word.format(layers.snap2) for word in first), *device)
    user, words = guest(vm), [""]
    async with connect(vm) as machine:
        for name in ("one", "two"):
            copy = await machine.blockcopy("vda", layers.folder / name)
            await copy.ready()
            words = [*(await copy.pivot()).launch]
            assert [word for word in expected if word not in words[-1]] == []
        taken = await machine.snapshot({"vda": layers.folder / "three"})
    assert [word for word in expected if word not in taken.snapshots[0].launch[-1]] == []
    vm.stop()
    again = words
    if how == "one blockdev below a filter":  # the filter stays as it is
        again = [*first[:2], *words, *first[4:]]
    second = boot(*again, *device)
    drives = [d for d in second.execute("query-block") if "virtio" in d.get("qdev", "")]
    attrs.evolve(user, vm=second, drive=drives[0]).check()
    second.stop()
