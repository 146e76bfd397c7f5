# SPDX-License-Identifier: MIT
"""The sizes that a result tells, compared with those that ``qemu-img info`` tells."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror.sizes import ImageSize
from qmpmirror.testing import NbdServer
from tests.qemu.servers import loop_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror import Result
    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Layers

    Start = Callable[[], Qemu]

SIZE = 8 << 20
SLACK = 256 << 10
"""A file system may count a few blocks of its own, and QEMU writes the last metadata at its end."""

SOURCES = {
    "drive": ("-drive", "if=virtio,format=qcow2,file={}"),
    "blockdev": (
        *("-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
    ),
}

both_depths = pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
both_endings = pytest.mark.parametrize("ending", ["pivot", "finish"])


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot(*(word.format(layers.snap2) for word in SOURCES["drive"]))


async def copied(
    connect: Connect, vm: Qemu, destination: Path | str, ending: str, **options: Any
) -> Result:
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", destination, **options)
        await copy.ready()
        return await (copy.pivot() if ending == "pivot" else copy.finish())


def taken(layers: Layers, *files: Path) -> int:
    """What files take up, as qemu-img says."""
    return sum(layers.images.info(file, "raw")["actual-size"] for file in files)


@both_endings
@both_depths
@pytest.mark.parametrize("source", list(SOURCES))
async def test_qcow2(
    boot: Boot, connect: Connect, layers: Layers, source: str, ending: str, *, shallow: bool
) -> None:
    vm = boot(*(word.format(layers.snap2) for word in SOURCES[source]))
    whole = [layers.snap2] if shallow else [layers.snap2, layers.snap1, layers.base]
    before = taken(layers, *whole)
    path = layers.folder / "copy"
    result = await copied(connect, vm, path, ending, shallow=shallow)
    vm.stop()
    assert result.source_size == ImageSize(SIZE, before)
    assert result.destination_size is not None
    assert result.destination_size.virtual == layers.images.info(path)["virtual-size"] == SIZE
    assert result.destination_size.allocated == pytest.approx(taken(layers, path), abs=SLACK)
    assert result.destination_size.allocated


@both_endings
async def test_a_source_that_grows_is_told_as_it_is_in_the_end(
    connect: Connect, layers: Layers, boot: Boot, ending: str
) -> None:
    vm = boot(*(word.format(layers.snap2) for word in SOURCES["blockdev"]))
    before = taken(layers, layers.snap2)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy", shallow=True)
        await copy.ready()
        vm.io("dev0", "write -P 1 6M 1M")
        result = await (copy.pivot() if ending == "pivot" else copy.finish())
    assert result.source_size is not None
    assert result.source_size.allocated is not None
    assert result.source_size.allocated >= before + (1 << 20)


@both_endings
async def test_raw(vm: Qemu, connect: Connect, layers: Layers, ending: str) -> None:
    path = layers.folder / "copy"
    result = await copied(connect, vm, path, ending, format="raw")
    vm.stop()
    assert result.destination_size is not None
    assert result.destination_size.virtual == SIZE
    assert result.destination_size.allocated == pytest.approx(taken(layers, path), abs=SLACK)
    assert 0 < (result.destination_size.allocated or 0) < SIZE


@both_endings
async def test_data_file(vm: Qemu, connect: Connect, layers: Layers, ending: str) -> None:
    path, data = layers.folder / "copy", layers.folder / "data"
    creation = {"data_file": str(data), "data_file_raw": "on"}
    result = await copied(connect, vm, path, ending, creation=creation)
    vm.stop()
    assert result.destination_size is not None
    allocated = result.destination_size.allocated or 0
    assert allocated == pytest.approx(taken(layers, path, data), abs=SLACK)
    assert allocated > taken(layers, path)


@both_endings
@pytest.mark.parametrize("given", ["luks", "qcow2"])
async def test_luks(
    vm: Qemu, connect: Connect, layers: Layers, tmp_path: Path, given: str, ending: str
) -> None:
    path, secret = layers.folder / "copy", tmp_path / "secret"
    secret.write_text("a long passphrase")
    fast = {"encrypt.iter-time" if given == "qcow2" else "iter-time": "10"}
    how = {"format": given, "secret": str(secret), "creation": fast}
    result = await copied(connect, vm, path, ending, **how)
    vm.stop()
    assert result.destination_size is not None
    assert result.destination_size.virtual == SIZE
    assert result.destination_size.allocated == pytest.approx(taken(layers, path), abs=SLACK)


@both_endings
async def test_what_qemu_cannot_tell_of_a_device(
    vm: Qemu, connect: Connect, tmp_path: Path, ending: str
) -> None:
    with loop_device(tmp_path / "file", 2 * SIZE) as device:
        result = await copied(connect, vm, device, ending, format="raw")
        vm.stop()
    assert result.destination_size == ImageSize(SIZE, None)


@both_endings
async def test_what_qemu_cannot_tell_of_an_export(
    vm: Qemu, connect: Connect, layers: Layers, tmp_path: Path, ending: str
) -> None:
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    with NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu) as server:
        result = await copied(connect, vm, server.uri, ending)
        vm.stop()
    assert result.destination_size == ImageSize(SIZE, None)


async def test_a_copy_that_was_removed_has_no_size(
    vm: Qemu, connect: Connect, layers: Layers, pinned: dict[str, Any]
) -> None:
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy", **pinned)
        result = await copy.abort()
    assert result.removed
    assert result.destination_size is None


@pytest.mark.parametrize("ending", ["--pivot", "--finish"])
def test_a_person_is_told(vm: Qemu, cli: Cli, layers: Layers, ending: str) -> None:
    run = cli("blockcopy", vm.qmp, "vda", layers.folder / "copy", "--shallow", ending, "--verbose")
    assert run.returncode == 0, run.stderr
    size = r"8\.0 MiB, [\d.]+ [KM]iB of it allocated"
    assert_line(run.stderr, f"the source is {size}; the copy {size}")


def test_a_person_is_not_told_what_nobody_knows(
    vm: Qemu, cli: Cli, layers: Layers, tmp_path: Path
) -> None:
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    with NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu) as server:
        run = cli("blockcopy", vm.qmp, "vda", server.uri, "--finish", "--verbose")
    assert run.returncode == 0, run.stderr
    assert_line(run.stderr, r"the source is 8\.0 MiB, .* allocated; the copy 8\.0 MiB")


def assert_line(text: str, wanted: str) -> None:
    assert [line for line in text.splitlines() if re.fullmatch(wanted, line)], text


@pytest.mark.parametrize("ending", ["--pivot", "--finish"])
def test_a_program_is_told(vm: Qemu, cli: Cli, layers: Layers, ending: str) -> None:
    before = taken(layers, layers.snap2)
    path = layers.folder / "copy"
    run = cli("blockcopy", vm.qmp, "vda", path, "--shallow", ending, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    vm.stop()
    assert result["source_size"] == {"virtual": SIZE, "allocated": before}
    copy = result["destination_size"]
    assert copy["virtual"] == SIZE
    assert copy["allocated"] == pytest.approx(taken(layers, path), abs=SLACK)
