# SPDX-License-Identifier: MIT
"""A sparse disk stays sparse on every destination that can be sparse; zeroes are found on wish."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import errors
from qmpmirror.testing import NbdServer
from tests.qemu.servers import loop_device

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror import Result
    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Connect, Layers, Unchanged

MIB = 1 << 20
SIZE = 32 * MIB
SLACK = MIB
"""Metadata, and a file system that allocates a little ahead."""

DATA = 0x77
SOURCES: dict[str, list[str]] = {
    "drive": ["-drive", "if=none,id=d,format={1},file={0}"],
    "blockdev": ["-blockdev", "{1},node-name=d,file.driver=file,file.filename={0}"],
}


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture(params=["raw", "qcow2"])
def fmt(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def source(layers: Layers, fmt: str) -> Path:
    """Every second of its eight parts of 4 MiB holds data, the others are holes."""
    path = layers.images.create(layers.folder / "half", SIZE, fmt=fmt)
    for part in range(0, 8, 2):
        layers.images.write_pattern(path, part * 4 * MIB, 4 * MIB, DATA, fmt)
    assert allocated(path) <= SIZE // 2 + SLACK
    return path


@pytest.fixture
def vm(boot: Boot, source: Path, fmt: str) -> Qemu:
    return start(boot, source, fmt)


def start(boot: Boot, source: Path, fmt: str, how: str = "drive", more: str = "") -> Qemu:
    disk = [word.format(source, fmt) for word in SOURCES[how]]
    return boot(disk[0], disk[1] + more, "-device", "virtio-blk-pci,drive=d,id=dev0")


async def finished(connect: Connect, vm: Qemu, where: Path | str, **options: Any) -> Result:
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", where, **options)
        await copy.ready()
        return await copy.finish()


def check_sparse(copy: Path, source: Path) -> None:
    assert allocated(copy) <= allocated(source) + SLACK


@pytest.mark.parametrize("how", list(SOURCES))
@pytest.mark.parametrize("to", ["raw", "qcow2"])
async def test_files(
    boot: Boot, connect: Connect, layers: Layers, source: Path, fmt: str, to: str, how: str
) -> None:
    vm = start(boot, source, fmt, how)
    copy = layers.folder / "copy"
    result = await finished(connect, vm, copy, format=to)
    check_sparse(copy, source)
    layers.images.compare(source, copy, fmt, to)
    assert result.source_size is not None
    assert result.destination_size is not None
    assert (result.source_size.allocated or SIZE) <= SIZE // 2 + SLACK
    assert (result.destination_size.allocated or SIZE) <= SIZE // 2 + SLACK


async def test_data_file(vm: Qemu, connect: Connect, layers: Layers, source: Path) -> None:
    data = layers.folder / "data"
    creation = {"data_file": str(data), "data_file_raw": "on"}
    await finished(connect, vm, layers.folder / "copy", format="qcow2", creation=creation)
    check_sparse(data, source)
    assert content(layers, source) == data.read_bytes()


def content(layers: Layers, path: Path) -> bytes:
    return layers.content(path, layers.images.info(path)["format"])


async def test_luks_in_qcow2(
    vm: Qemu, connect: Connect, layers: Layers, source: Path, tmp_path: Path
) -> None:
    """LUKS over raw can not: what is zero there is not zero when it is decrypted."""
    secret = tmp_path / "secret"
    secret.write_text("a long passphrase")
    copy = layers.folder / "copy"
    fast = {"encrypt.iter-time": "10"}
    await finished(connect, vm, copy, format="qcow2", secret=str(secret), creation=fast)
    assert allocated(copy) <= allocated(source) + 3 * MIB  # LUKS has a header of 2 MiB


async def test_loop_device(
    vm: Qemu, connect: Connect, layers: Layers, source: Path, tmp_path: Path
) -> None:
    with loop_device(tmp_path / "file", SIZE) as device:
        # What was there before is given back to the storage.
        with device.open("r+b") as file:
            file.write(b"\x99" * SIZE)
            os.fsync(file.fileno())
        assert allocated(tmp_path / "file") >= SIZE
        await finished(connect, vm, device, format="raw", overwrite=True)
        check_sparse(tmp_path / "file", source)
        assert device.read_bytes() == content(layers, source)


@pytest.mark.parametrize("size", [SIZE, SIZE + 8 * MIB], ids=["equal", "larger"])
async def test_export(
    vm: Qemu, connect: Connect, layers: Layers, source: Path, tmp_path: Path, size: int
) -> None:
    image = layers.images.create(tmp_path / "served", size, fmt="raw")
    # Half of what will be zero is data before: the copy has to punch it out.
    layers.images.write_pattern(image, 4 * MIB, 4 * MIB, 0x99, "raw")
    words = ("--discard=unmap",)
    with NbdServer(
        directory=tmp_path, image=image, qemu=layers.images.qemu, arguments=words
    ) as server:
        await finished(connect, vm, server.uri, overwrite=True)
    check_sparse(image, source)
    assert image.read_bytes()[:SIZE] == content(layers, source)


@pytest.mark.parametrize("to", ["raw", "qcow2"])
async def test_a_prepared_image_that_holds_something(
    vm: Qemu, connect: Connect, layers: Layers, source: Path, fmt: str, to: str
) -> None:
    copy = layers.images.create(layers.folder / "copy", SIZE, fmt=to)
    layers.images.write_pattern(copy, 0, SIZE, 0x99, to)
    await finished(connect, vm, copy, format=to, reuse_external=True)
    layers.images.compare(source, copy, fmt, to)
    if to == "raw":
        check_sparse(copy, source)


@pytest.fixture
def zeroes(layers: Layers) -> Path:
    """A raw disk with 16 MiB of written zeroes, and 4 MiB of data."""
    path = layers.folder / "zeroes"
    with path.open("wb") as file:
        file.write(bytes([DATA]) * 4 * MIB)
        file.write(bytes(16 * MIB))
        file.truncate(SIZE)
    assert allocated(path) >= 20 * MIB
    return path


@pytest.mark.parametrize("wish", ["off", "on", "unmap"])
@pytest.mark.parametrize("to", ["raw", "qcow2"])
async def test_detect_zeroes(
    boot: Boot, connect: Connect, layers: Layers, zeroes: Path, to: str, wish: str
) -> None:
    vm = start(boot, zeroes, "raw")
    copy = layers.folder / "copy"
    await finished(connect, vm, copy, format=to, detect_zeroes=wish)
    layers.images.compare(zeroes, copy, "raw", to)
    # On raw "on" only saves the writing: the zeroes are allocated all the same.
    if wish == "off" or (wish, to) == ("on", "raw"):
        assert allocated(copy) >= 20 * MIB
    else:
        assert allocated(copy) <= 4 * MIB + SLACK


@pytest.mark.parametrize("to", ["raw", "qcow2"])
@pytest.mark.parametrize("how", list(SOURCES))
async def test_detect_zeroes_of_the_source(
    boot: Boot, connect: Connect, layers: Layers, zeroes: Path, to: str, how: str
) -> None:
    """``unmap`` on a qcow2 target would lose data (hazard 13): there it becomes ``on``."""
    vm = start(boot, zeroes, "raw", how, ",discard=unmap,detect-zeroes=unmap")
    copy = layers.folder / "copy"
    async with connect(vm) as machine:
        running = await machine.blockcopy("vda", copy, format=to)
        await running.ready()
        target = (await machine.graph()).nodes[running.target_node]
        assert target.detect_zeroes == {"raw": "unmap", "qcow2": "on"}[to]
        # What the guest overwrites with zeroes must not come back.
        vm.io("dev0", "write -P 0 1M 1M")
        vm.io("dev0", "write -P 0x55 2M 64k")
        await running.pivot()
    vm.io("dev0", "write -P 0 3M 1M")
    vm.io("dev0", "read -P 0 3M 1M")
    vm.stop()
    layers.images.verify_pattern(copy, MIB, MIB, 0, to)
    layers.images.verify_pattern(copy, 2 * MIB, 65536, 0x55, to)
    layers.images.verify_pattern(copy, 3 * MIB, MIB, 0, to)
    layers.images.verify_pattern(copy, 0, MIB, DATA, to)


@pytest.mark.qemu(">= 10.1")
@pytest.mark.parametrize("fmt", ["raw"], indirect=True)
async def test_dest_is_zero_is_believed(
    vm: Qemu, connect: Connect, layers: Layers, tmp_path: Path
) -> None:
    """What is not zero stays there: so the holes were not written at all."""
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    layers.images.write_pattern(image, 4 * MIB, MIB, 0x99, "raw")
    with NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu) as server:
        await finished(connect, vm, server.uri, dest_is_zero=True, overwrite=True)
    layers.images.verify_pattern(image, 4 * MIB, MIB, 0x99, "raw")
    layers.images.verify_pattern(image, 8 * MIB, 4 * MIB, DATA, "raw")


@pytest.mark.qemu("< 10.1")
@pytest.mark.parametrize("fmt", ["raw"], indirect=True)
async def test_dest_is_zero_cannot_be_told(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged, tmp_path: Path
) -> None:
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    nbd = NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu)
    reason = r"cannot be told that .* is zero \(QEMU 10\.1 and newer can\)"
    with nbd, unchanged(vm, layers.folder), pytest.raises(errors.Unsupported, match=reason):
        await finished(connect, vm, nbd.uri, dest_is_zero=True)
