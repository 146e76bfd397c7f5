# SPDX-License-Identifier: MIT
"""Destinations that are block devices: loop devices here."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest

import qmpmirror
from qmpmirror import Phase
from tests.qemu.servers import loop_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Connect, Guest, Layers, Unchanged

    MakeGuest = Callable[..., Guest]
    Loop = Callable[[int], Path]

SIZE = 8 * 1024 * 1024


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """Make a loop device of so many bytes."""
    with contextlib.ExitStack() as made:
        numbers = itertools.count()
        yield lambda size: made.enter_context(
            loop_device(tmp_path / f"device{next(numbers)}", size)
        )


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE], ids=["equal", "larger"])
async def test_raw_on_a_device(
    vm: Qemu, connect: Connect, loop: Loop, guest: MakeGuest, size: int
) -> None:
    device = loop(size)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", device, format="raw", blockdev=True)
        await copy.ready()
        user.scribble()
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        user.scribble()
        user.check()
        (disk,) = [disk for disk in await machine.disks() if disk.target == "vda"]
        assert disk.storage_type == "block"
        assert disk.image is not None
        assert disk.image.virtual_size == SIZE
    vm.stop()
    content = device.read_bytes()
    assert content[:SIZE] == bytes(user.expected)
    assert not any(content[SIZE:])


async def test_qcow2_on_a_device(vm: Qemu, connect: Connect, loop: Loop, layers: Layers) -> None:
    device = loop(2 * SIZE)
    expected = layers.content(layers.snap2)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", device, shallow=True)
        await copy.ready()
        assert (await copy.finish()).outcome is Phase.FINISHED
    assert layers.content(device) == expected


@pytest.mark.parametrize("offset", [0, 1024, 2 * SIZE - 512], ids=["start", "ext4", "end"])
async def test_a_device_that_holds_something_is_refused(
    vm: Qemu,
    connect: Connect,
    loop: Loop,
    layers: Layers,
    unchanged: Unchanged,
    offset: int,
) -> None:
    device = loop(2 * SIZE)
    with device.open("r+b") as file:
        file.seek(offset)
        file.write(b"precious")
    async with connect(vm) as machine:
        with (
            unchanged(vm, layers.folder),
            pytest.raises(qmpmirror.DestinationExists, match=r"not empty.*--overwrite"),
        ):
            await machine.blockcopy("vda", device, format="raw")
        assert b"precious" in device.read_bytes()
        copy = await machine.blockcopy("vda", device, format="raw", overwrite=True)
        await copy.ready()
        await copy.finish()
    assert device.read_bytes()[:SIZE] == layers.content(layers.snap2)


async def test_a_device_that_is_too_small_is_refused_with_both_numbers(
    vm: Qemu, connect: Connect, loop: Loop, layers: Layers, unchanged: Unchanged
) -> None:
    device = loop(SIZE // 2)
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(
                qmpmirror.DestinationError, match=f"{SIZE // 2} bytes: too small.*{SIZE} bytes"
            ):
                await machine.blockcopy("vda", device, format="raw")


async def test_blockdev_means_a_device(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged
) -> None:
    file = layers.folder / "file"
    layers.images.create(file, SIZE, fmt="raw")
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            for path, reason in ((file, "is not a block device"), (file / "x", "Not a directory")):
                with pytest.raises(qmpmirror.DestinationError, match=reason):
                    await machine.blockcopy("vda", path, blockdev=True)
            with pytest.raises(qmpmirror.DestinationError, match="does not exist"):
                await machine.blockcopy("vda", layers.folder / "missing", blockdev=True)
