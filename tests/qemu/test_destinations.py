# SPDX-License-Identifier: MIT
"""What a copy's image looks like: format, size, clusters, sparseness, and paths of any kind."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import Phase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import ImageTools
    from tests.qemu.conftest import Boot, Connect, Guest, Layers

both_depths = pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
both_ways = pytest.mark.parametrize("via", ["blockdev-mirror", "drive-mirror"])


def virtio(image: Path | str, fmt: str = "qcow2", **options: Any) -> list[str]:
    """A ``-blockdev`` disk; as JSON, so that any path will do."""
    node = {
        "driver": fmt,
        "node-name": "fmt0",
        "file": {"driver": "file", "node-name": "prot0", "filename": str(image)},
        **options,
    }
    return ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,id=dev0,drive=fmt0"]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@attrs.frozen
class Scene:
    """Copies under a writing guest."""

    layers: Layers
    boot: Boot
    connect: Connect
    guest: Callable[..., Guest]

    async def pivot(self, source: Path, destination: Path, to: str = "qcow2", **how: Any) -> None:
        """Copy, pivot, and check the disk and then the image: each holds what was written."""
        vm = self.boot(*virtio(source))
        writer = self.guest(vm, image=source)
        writer.scribble()
        async with self.connect(vm) as machine:
            copy = await machine.blockcopy("vda", destination, format=to, **how)
            writer.scribble()
            await copy.ready()
            writer.scribble()
            result = await copy.pivot()
        assert (result.outcome, result.active) == (Phase.PIVOTED, str(destination))
        writer.scribble()
        writer.check()
        vm.stop()
        assert self.layers.content(destination, to) == writer.expected


@pytest.fixture
def scene(layers: Layers, boot: Boot, connect: Connect, guest: Callable[..., Guest]) -> Scene:
    return Scene(layers, boot, connect, guest)


# QEMU 5.2 hangs when two writes to a new VDI image meet ("Reimplement CoRwlock", 6.0).
VDI = pytest.param("vdi", marks=pytest.mark.qemu(">= 6.0"))


@both_ways
@pytest.mark.parametrize("fmt", ["qcow", "qcow2", "qed", "raw", VDI, "vmdk", "vpc", "parallels"])
async def test_full_copy_into_a_format(fmt: str, via: str, layers: Layers, scene: Scene) -> None:
    if not layers.has_format(fmt):
        pytest.skip(f"this QEMU was built without {fmt}")
    destination = layers.folder / "copy.img"
    await scene.pivot(layers.snap2, destination, to=fmt, via=via)
    info = layers.images.info(destination, fmt)
    assert (info["format"], info["virtual-size"]) == (fmt, 8 << 20)
    assert "backing-filename" not in info


@both_ways
@both_depths
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
async def test_cluster_size_is_carried_over(
    cluster_size: int, shallow: bool, via: str, layers: Layers, images: ImageTools, scene: Scene
) -> None:
    options = {"cluster_size": cluster_size}
    top = images.create(layers.folder / "top.qcow2", backing=layers.snap2, options=options)
    images.write_pattern(top, 1 << 20, 4096, 0x77)
    destination = layers.folder / "copy.qcow2"
    await scene.pivot(top, destination, shallow=shallow, via=via)
    # A shallow drive-mirror makes its image itself, in its own way.
    by_qemu = shallow and via == "drive-mirror"
    assert images.info(destination)["cluster-size"] == (65536 if by_qemu else cluster_size)


@both_ways
@both_depths
async def test_subclusters_are_carried_over(
    shallow: bool, via: str, layers: Layers, images: ImageTools, scene: Scene
) -> None:
    options = {"extended_l2": "on", "cluster_size": 131072}
    top = images.create(layers.folder / "top.qcow2", backing=layers.snap2, options=options)
    destination = layers.folder / "copy.qcow2"
    await scene.pivot(top, destination, shallow=shallow, via=via)
    info = images.info(destination)
    # A shallow drive-mirror makes its image itself, in its own way.
    by_qemu = shallow and via == "drive-mirror"
    assert info["format-specific"]["data"]["extended-l2"] is not by_qemu
    assert info["cluster-size"] == (65536 if by_qemu else 131072)


@both_ways
@pytest.mark.parametrize("no_flush", [True, False], ids=["no-flush", "flush"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
async def test_cache_mode_is_carried_over(
    direct: bool, no_flush: bool, via: str, layers: Layers, boot: Boot, connect: Connect
) -> None:
    cache = {"direct": direct, "no-flush": no_flush}
    vm = boot(*virtio(layers.snap2, cache=cache))
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy.qcow2", shallow=True, via=via)
        await copy.ready()
        await copy.pivot()
    (drive,) = vm.execute("query-block")
    assert drive["inserted"]["image"]["filename"] == str(layers.folder / "copy.qcow2")
    carried = drive["inserted"]["cache"]
    assert (carried["direct"], carried["no-flush"]) == (direct, no_flush)


# QEMU 10.0 writes zeroes out in full unless the target is opened with discard=unmap, which nobody
# can tell drive-mirror.
FULL_ZEROES = pytest.param("raw", "drive-mirror", marks=pytest.mark.qemu("!= 10.0"))


@pytest.mark.parametrize(
    ("to", "via"),
    [
        ("raw", "blockdev-mirror"),
        FULL_ZEROES,
        ("qcow2", "blockdev-mirror"),
        ("qcow2", "drive-mirror"),
    ],
)
@pytest.mark.parametrize("of", ["raw", "qcow2"])
async def test_sparse_stays_sparse(
    of: str, to: str, via: str, tmp_path: Path, images: ImageTools, boot: Boot, connect: Connect
) -> None:
    source = images.create(tmp_path / "source.img", "64M", of)
    images.write_pattern(source, 32 << 20, 1 << 20, 0x77, of)
    vm = boot(*virtio(source, of))
    destination = tmp_path / "copy.img"
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", destination, format=to, via=via)
        await copy.ready()
        await copy.finish()
    images.compare(source, destination, of, to)
    assert allocated(destination) <= allocated(source) + (1 << 20)


@both_ways
async def test_relative_destination_is_the_callers(
    via: str,
    layers: Layers,
    boot: Boot,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    vm = boot(*virtio(layers.snap2))
    monkeypatch.chdir(ours)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", "copy.qcow2", shallow=True, via=via)
        await copy.ready()
        result = await copy.pivot()
    assert result.destination == result.active == str(ours / "copy.qcow2")
    assert layers.chain(ours / "copy.qcow2") == [
        str(ours / "copy.qcow2"),
        str(layers.snap1),
        str(layers.base),
    ]
    assert list(theirs.iterdir()) == []


async def test_relative_images_of_qemu_become_absolute_in_the_copy(
    images: ImageTools,
    boot: Boot,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    base, snap1, snap2 = images.make_chain(theirs, size="8M")
    for image, backing in ((snap1, base), (snap2, snap1)):
        images._run("qemu-img", "rebase", "-u", "-b", backing.name, "-F", "qcow2", str(image))
    monkeypatch.chdir(theirs)
    vm = boot(*virtio("snap2.qcow2"))
    monkeypatch.chdir(tmp_path)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", "copy.qcow2", shallow=True)
        await copy.ready()
        result = await copy.finish()
        assert (result.source, result.active) == (str(snap2), str(snap2))
    assert images.info(tmp_path / "copy.qcow2")["backing-filename"] == str(snap1)
    images.compare(tmp_path / "copy.qcow2", snap2)


@both_ways
async def test_backing_named_by_json(
    via: str, layers: Layers, images: ImageTools, scene: Scene
) -> None:
    backing = {"driver": "qcow2", "file": {"driver": "file", "filename": str(layers.snap1)}}
    rebase = ["rebase", "-u", "-b", f"json:{json.dumps(backing)}", "-F", "qcow2"]
    images._run("qemu-img", *rebase, str(layers.snap2))
    destination = layers.folder / "copy.qcow2"
    await scene.pivot(layers.snap2, destination, shallow=True, via=via)


@both_ways
@both_depths
async def test_empty_file_is_used(shallow: bool, via: str, layers: Layers, scene: Scene) -> None:
    destination = layers.folder / "copy.qcow2"
    destination.touch(mode=0o640)
    inode = destination.stat().st_ino
    await scene.pivot(layers.snap2, destination, shallow=shallow, via=via)
    assert (destination.stat().st_ino, destination.stat().st_mode & 0o777) == (inode, 0o640)


async def test_empty_file_of_somebody_else_survives_an_abort(
    layers: Layers, boot: Boot, connect: Connect, pinned: dict[str, Any]
) -> None:
    destination = layers.folder / "copy.qcow2"
    destination.touch()
    vm = boot(*virtio(layers.snap2))
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", destination, **pinned)
        result = await copy.abort()
    assert (result.outcome, result.consistent, result.removed) == (Phase.ABORTED, False, False)
    assert destination.exists()


@both_ways
@both_depths
@pytest.mark.parametrize("to", ["raw", "qcow2"])
async def test_odd_size_without_backing(
    to: str,
    shallow: bool,
    via: str,
    tmp_path: Path,
    images: ImageTools,
    boot: Boot,
    connect: Connect,
) -> None:
    source, destination = tmp_path / "source.raw", tmp_path / "copy.img"
    source.write_bytes(os.urandom(1048676))
    vm = boot(*virtio(source, "raw"))
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", destination, shallow=shallow, format=to, via=via)
        await copy.ready()
        vm.io("dev0", "write -P 0x77 1048576 512")
        result = await copy.pivot()
        assert (result.outcome, result.left) == (Phase.PIVOTED, ())
        vm.io("dev0", "read -P 0x77 1048576 512")
    vm.stop()
    images.compare(source, destination, "raw", to)
    assert (
        images.info(destination, to)["virtual-size"] == images.info(source, "raw")["virtual-size"]
    )


NAMES = (
    "with space",
    "comma,comma,,",
    "colon:colon",
    "nbd:localhost:10809",
    'json:{"driver":"null-co"}',
    "json:",
    "file:",
    "percent%20%s%",
    "quote'\"\\",
    "größe-磁盘",
    "-dash",
    "new\nline",
)


@both_ways
@both_depths
@pytest.mark.parametrize("name", NAMES)
async def test_file_names_of_any_kind(
    name: str,
    shallow: bool,
    via: str,
    tmp_path: Path,
    images: ImageTools,
    boot: Boot,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    lower, upper = images.make_chain(folder, (f"lower {name}", f"upper {name}"), "8M")
    monkeypatch.chdir(folder)
    vm = boot(*virtio(upper), directory=tmp_path)
    async with connect(vm) as machine:
        copy = await machine.blockcopy(str(upper), f"copy {name}", shallow=shallow, via=via)
        await copy.ready()
        result = await copy.pivot()
        vm.io("dev0", "write -P 0x77 0 4096")
        assert (await machine.disk("vda")).path == str(folder / f"copy {name}")
    destination = folder / f"copy {name}"
    assert (result.source, result.active) == (str(upper), str(destination))
    assert images.chain(destination) == [str(destination), *([str(lower)] if shallow else [])]
    vm.stop()
    images.write_pattern(upper, 0, 4096, 0x77)
    images.compare(upper, destination)


@both_depths
async def test_both_ways_end_alike(
    shallow: bool,
    tmp_path: Path,
    images: ImageTools,
    boot: Boot,
    connect: Connect,
) -> None:
    """The same chain at the same paths, copied in both ways, gives the same everything."""
    seen = []
    for via in ("blockdev-mirror", "drive-mirror"):
        folder = tmp_path / via
        folder.mkdir()
        *_, top = images.make_chain(folder, size="8M")
        vm = boot(*virtio(top))
        async with connect(vm) as machine:
            copy = await machine.blockcopy("vda", folder / "copy", shallow=shallow, via=via)
            await copy.ready()
            result = await copy.pivot()
            (disk,) = await machine.disks()
            graph = await machine.graph()
        images.compare(top, folder / "copy")
        vm.stop()
        assert disk.image is not None
        seen.append(
            {
                "outcome": result.outcome,
                "left": result.left,
                "consistent": result.consistent,
                "chain": [graph.path(node.name) for node in graph.chain(disk.node)],
                "drivers": [node.driver for node in graph.chain(disk.node)],
                "roles": disk.node.rpartition("-")[2],
                "nodes": len(graph.nodes),
                "header": images.chain(folder / "copy"),
                "info": disk.image.virtual_size,
                "files": sorted(path.name for path in folder.iterdir()),
            }
        )
        shutil.rmtree(folder)
    one, other = (repr(result).replace(str(tmp_path), "") for result in seen)
    assert one.replace("blockdev-mirror", "VIA") == other.replace("drive-mirror", "VIA")


@both_ways
async def test_options_arrive_in_qemu(
    via: str, layers: Layers, boot: Boot, connect: Connect, tmp_path: Path
) -> None:
    vm = boot(*virtio(layers.snap2))
    options: dict[str, Any] = {"bandwidth": 12345, "granularity": 8192, "buf_size": 65536}
    async with connect(vm, transcript=tmp_path / "transcript") as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy", via=via, **options)
        (job,) = vm.execute("query-block-jobs")
        nodes = vm.execute("query-named-block-nodes", flat=True)
        await copy.set_bandwidth(1)
        (later,) = vm.execute("query-block-jobs")
        await copy.abort()
    assert (job["device"], job["speed"], later["speed"]) == (copy.id, 12345, 1)
    # QEMU keeps the job's own bitmap on the source, and since 8.2 on the job's filter.
    bitmaps = [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    assert 8192 in {bitmap["granularity"] for bitmap in bitmaps if not bitmap.get("name")}
    lines = map(json.loads, (tmp_path / "transcript").read_text().splitlines())
    (sent,) = [
        line["message"]["arguments"]
        for line in lines
        if line["direction"] == "sent" and line["message"]["execute"] == via
    ]
    assert (sent["speed"], sent["granularity"], sent["buf-size"]) == (12345, 8192, 65536)
