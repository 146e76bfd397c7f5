# SPDX-License-Identifier: MIT
"""``--reuse-external``: destinations that the user has prepared, with a chain of their own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Guest, Layers, Unchanged

    MakeGuest = Callable[..., Guest]

SIZE = 8 * 1024 * 1024


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot(
        *("-blockdev", f"file,node-name=prot0,filename={layers.snap2}"),
        *("-blockdev", "qcow2,node-name=fmt0,file=prot0"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
    )


@pytest.fixture
def other_base(layers: Layers) -> Path:
    """A copy of snap1 with all below it, for a destination to stand on."""
    return layers.folder / "other-base"


def arrive(layers: Layers, path: Path) -> None:
    """What somebody else copies while the mirror runs."""
    layers.images._run("qemu-img", "convert", "-O", "qcow2", "-U", str(layers.snap1), str(path))


def prepare(layers: Layers, base: Path, **options: Any) -> Path:
    """An overlay whose base need not be there yet."""
    path = layers.folder / "copy"
    words = ["create", "-q", "-u", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(path)]
    layers.images._run("qemu-img", *words, str(options.get("size", SIZE)))
    return path


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_full_copy_over_what_was_there(
    vm: Qemu, layers: Layers, connect: Connect, guest: MakeGuest, fmt: str
) -> None:
    path = layers.folder / "copy"
    layers.images.create(path, SIZE, fmt=fmt)
    layers.images.io(path, "write -P 0x99 0 8M", fmt=fmt)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", path, reuse_external=True, format=fmt)
        await copy.ready()
        user.scribble()
        assert (await copy.finish()).outcome is Phase.FINISHED
    assert layers.content(path, fmt) == bytes(user.expected)


@pytest.mark.parametrize("granularity", [0, 512, 65536])
async def test_base_arrives_while_the_copy_runs(
    vm: Qemu,
    layers: Layers,
    other_base: Path,
    connect: Connect,
    guest: MakeGuest,
    pinned: dict[str, Any],
    granularity: int,
) -> None:
    path = prepare(layers, other_base)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy(
            "vd0", path, shallow=True, reuse_external=True, granularity=granularity, **pinned
        )
        user.scribble()
        await copy.set_bandwidth(0)
        await copy.ready()
        user.scribble()
        arrive(layers, other_base)
        result = await copy.pivot()
        assert result.outcome is Phase.PIVOTED
        user.scribble()
        user.check()
        nodes = (await machine.graph()).nodes
        assert not {"fmt0", "prot0"} & set(nodes)
    vm.stop()
    assert layers.content(path) == bytes(user.expected)
    assert layers.chain(path) == [str(path), str(other_base)]


async def test_synchronous_writes_have_the_base_from_the_start(
    vm: Qemu,
    layers: Layers,
    other_base: Path,
    connect: Connect,
    guest: MakeGuest,
    pinned: dict[str, Any],
) -> None:
    """The bug that libvirt has: writes smaller than a cluster would hide the base's data."""
    arrive(layers, other_base)
    path = prepare(layers, other_base)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy(
            "vd0", path, shallow=True, reuse_external=True, synchronous_writes=True, **pinned
        )
        assert (await machine.graph()).nodes[copy.target_node].child("backing")
        for offset in (0x500, 0x80400, 0x401000):
            vm.io(user.device, f"write -P 0xee {offset} 512")
            user.expected[offset : offset + 512] = b"\xee" * 512
        await copy.set_bandwidth(0)
        await copy.ready()
        user.scribble()
        assert (await copy.pivot()).outcome is Phase.PIVOTED
    vm.stop()
    assert layers.content(path) == bytes(user.expected)


async def test_pivot_can_be_repeated_when_the_base_is_late(
    vm: Qemu, layers: Layers, other_base: Path, connect: Connect, guest: MakeGuest
) -> None:
    path = prepare(layers, other_base)
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", path, shallow=True, reuse_external=True)
        await copy.ready()
        before = set((await machine.graph()).nodes)
        for _ in range(2):
            with pytest.raises(qmpmirror.DestinationError, match=r"cannot be opened.*No such file"):
                await copy.pivot()
            assert set((await machine.graph()).nodes) == before
            assert copy.phase is Phase.MIRRORING
        arrive(layers, other_base)
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        user.check()


async def test_base_of_another_size_is_refused_at_the_pivot(
    vm: Qemu, layers: Layers, other_base: Path, connect: Connect
) -> None:
    layers.images.create(other_base, SIZE // 2)
    path = prepare(layers, other_base)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", path, shallow=True, reuse_external=True)
        await copy.ready()
        before = set((await machine.graph()).nodes)
        with pytest.raises(qmpmirror.DestinationError, match=f"{SIZE // 2} bytes.*{SIZE}"):
            await copy.pivot()
        assert set((await machine.graph()).nodes) == before
        await copy.abort()
    assert path.exists()


@pytest.mark.parametrize("synchronous", [False, True])
async def test_check_base_looks_at_the_content(
    vm: Qemu, layers: Layers, other_base: Path, connect: Connect, *, synchronous: bool
) -> None:
    arrive(layers, other_base)
    layers.images.io(other_base, "write -P 0x77 1M 512")
    path = prepare(layers, other_base)
    options: dict[str, Any] = {"shallow": True, "reuse_external": True, "check_base": True}
    async with connect(vm) as machine:
        before = set((await machine.graph()).nodes)
        if synchronous:
            with pytest.raises(qmpmirror.DestinationError, match="does not hold what"):
                await machine.blockcopy("vd0", path, synchronous_writes=True, **options)
            assert set((await machine.graph()).nodes) == before
            return
        copy = await machine.blockcopy("vd0", path, **options)
        await copy.ready()
        other = await machine.blockjob("vd0")  # as another process would
        assert isinstance(other, qmpmirror.Copy)
        with pytest.raises(qmpmirror.DestinationError, match="does not hold what"):
            await other.pivot()
        other.job.close()
        arrive(layers, other_base)
        assert (await copy.pivot()).outcome is Phase.PIVOTED


@pytest.mark.parametrize(
    ("prepared", "options", "reason"),
    [
        ("missing", {}, "does not exist"),
        ("qcow2 4M", {}, "virtual size of 4194304 bytes, the disk 8388608"),
        ("qcow2 8M", {"shallow": True}, "no backing file, which a shallow copy needs"),
        ("raw 4M", {"format": "raw"}, "too small|virtual size"),
        ("qcow2 8M", {"format": "raw", "shallow": True}, "raw cannot have a backing file"),
        ("raw 8M", {"format": "qcow2"}, "not in qcow2 format"),
    ],
)
async def test_unfit_destinations_change_nothing(
    vm: Qemu,
    layers: Layers,
    connect: Connect,
    unchanged: Unchanged,
    prepared: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    path = layers.folder / "copy"
    if prepared != "missing":
        fmt, size = prepared.split()
        layers.images.create(path, size, fmt=fmt)
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused, match=reason):
                await machine.blockcopy("vd0", path, reuse_external=True, **options)


async def test_a_raw_disk_that_looks_like_qcow2_is_not_taken_for_it(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    raw, path = layers.folder / "raw", layers.folder / "copy"
    layers.images.create(raw, SIZE, fmt="raw")
    layers.images.create(path, SIZE)
    vm = boot("-drive", f"if=virtio,format=raw,file={raw}")
    async with connect(vm) as machine:
        with pytest.raises(qmpmirror.DestinationError, match=r"looks like qcow2.*--format"):
            await machine.blockcopy("vda", path, reuse_external=True)


async def test_a_file_of_the_user_survives_every_end(
    vm: Qemu, layers: Layers, connect: Connect, pinned: dict[str, Any]
) -> None:
    path = layers.folder / "copy"
    layers.images.create(path, SIZE)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vd0", path, reuse_external=True, **pinned)
        assert not (await copy.abort()).removed
        await machine.blockcopy("vd0", path, reuse_external=True, **pinned)
        await machine.recover(qmpmirror.Way.UNDO)
    assert path.exists()


def test_the_command_line(vm: Qemu, layers: Layers, other_base: Path, cli: Cli) -> None:
    expected = layers.content(layers.snap2)
    arrive(layers, other_base)
    path = prepare(layers, other_base)
    run = cli(
        *("blockcopy", vm.qmp, "vd0", path, "--shallow", "--reuse-external", "--check-base"),
        *("--wait", "--pivot"),
    )
    assert (run.returncode, run.stdout) == (0, "Successfully pivoted\n")
    assert layers.content(path) == expected
    shutil.copy(path, layers.folder / "x")
    layers.images.io(layers.snap2, "write -P 1 0 512")  # its lock is released


async def test_overwrite_formats_what_is_there(vm: Qemu, layers: Layers, connect: Connect) -> None:
    path = layers.folder / "copy"
    path.write_bytes(b"precious" * 100)
    expected = layers.content(layers.snap2)
    async with connect(vm) as machine:
        with pytest.raises(qmpmirror.DestinationExists, match="--overwrite"):
            await machine.blockcopy("vd0", path)
        assert path.read_bytes().startswith(b"precious")
        copy = await machine.blockcopy("vd0", path, overwrite=True)
        await copy.ready()
        await copy.finish()
    assert layers.content(path) == expected
