# SPDX-License-Identifier: MIT
"""What is carried over from the disk to its copy, and what its filters do to a copy."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase
from qmpmirror.operations.options import Options
from qmpmirror.testing import ImageError
from qmpmirror.testing.process import LaunchError

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror import Machine
    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Layers

MIB = 1 << 20
DEVICE = ("-device", "virtio-blk-pci,drive=fmt0,id=dev0")


async def pivoted(machine: Machine, path: Path, **options: Any) -> None:
    copy = await machine.blockcopy("vda", path, **options)
    await copy.ready()
    assert (await copy.pivot()).outcome is Phase.PIVOTED


def device(vm: Qemu) -> dict[str, Any]:
    found: list[dict[str, Any]] = vm.execute("query-block")
    (drive,) = [drive for drive in found if "inserted" in drive]
    return drive


CACHE_MODES = {
    "none": (True, False),
    "writeback": (False, False),
    "writethrough": (False, False),
    "directsync": (True, False),
    "unsafe": (False, True),
}


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("mode", list(CACHE_MODES))
async def test_cache_modes_of_a_drive(
    boot: Boot, connect: Connect, layers: Layers, mode: str, fmt: str
) -> None:
    vm = boot("-drive", f"if=virtio,format=qcow2,cache={mode},file={layers.snap2}")
    before = device(vm)["inserted"]["cache"]
    assert (before["direct"], before["no-flush"]) == CACHE_MODES[mode]
    async with connect(vm) as machine:
        await pivoted(machine, layers.folder / "copy", format=fmt)
        graph = await machine.graph()
    # The write cache is the device's own, and the guest's driver has the last word on it.
    after = device(vm)["inserted"]["cache"]
    assert (after["direct"], after["no-flush"]) == CACHE_MODES[mode]
    made = [node for node in graph.nodes.values() if node.name.startswith("qmpmirror-")]
    assert [(node.cache_direct, node.cache_no_flush) for node in made] == [CACHE_MODES[mode]] * 2


AIO_SOURCES = {
    "-drive": ["-drive", "if=none,id=fmt0,format=qcow2,file={0},aio={1},cache=none"],
    "-blockdev": [
        "-blockdev",
        "qcow2,node-name=fmt0,file.driver=file,file.filename={0},file.aio={1},file.cache.direct=on",
    ],
    "two -blockdevs": [
        *("-blockdev", "file,node-name=prot0,filename={0},aio={1},cache.direct=on"),
        *("-blockdev", "qcow2,node-name=fmt0,file=prot0,cache.direct=on"),
    ],
    "JSON": ["-blockdev", "json"],
}


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
@pytest.mark.parametrize("source", list(AIO_SOURCES))
async def test_aio(
    boot: Boot, connect: Connect, layers: Layers, tmp_path: Path, source: str, aio: str
) -> None:
    node = {
        "driver": "qcow2",
        "node-name": "fmt0",
        "cache": {"direct": True},
        "file": {
            "driver": "file",
            "filename": str(layers.snap2),
            "aio": aio,
            "cache": {"direct": True},
        },
    }
    words = [word.format(layers.snap2, aio) for word in AIO_SOURCES[source]]
    words = [json.dumps(node) if word == "json" else word for word in words]
    try:
        vm = boot(*words, *DEVICE)
    except LaunchError as error:
        if aio == "io_uring" and "aio" in str(error):
            pytest.skip(f"NOT TESTED: this QEMU has no io_uring here: {str(error)[:200]}")
        raise
    transcript = tmp_path / "transcript"
    async with connect(vm, transcript=transcript) as machine:
        await pivoted(machine, layers.folder / "copy", shallow=True)
    assert storage(transcript)["aio"] == aio
    vm.io("dev0", "write -P 1 0 64k")
    vm.io("dev0", "read -P 1 0 64k")


def storage(transcript: Path) -> dict[str, Any]:
    """The options with which the copy's protocol node was opened."""
    sent = [json.loads(line)["message"] for line in transcript.read_text().splitlines()]
    (options,) = [
        message["arguments"]
        for message in sent
        if message.get("execute") == "blockdev-add"
        and message["arguments"]["node-name"].endswith("-storage")
    ]
    return dict(options)


async def test_no_aio_where_none_was_given(
    boot: Boot, connect: Connect, layers: Layers, tmp_path: Path
) -> None:
    vm = boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")
    transcript = tmp_path / "transcript"
    async with connect(vm, transcript=transcript) as machine:
        await pivoted(machine, layers.folder / "copy", shallow=True)
    assert "aio" not in storage(transcript)


@pytest.mark.parametrize("disk", ["-drive", "-blockdev"])
async def test_discard_reaches_the_copy(
    boot: Boot, connect: Connect, layers: Layers, disk: str
) -> None:
    """What the guest trims after the pivot is given back by the copy."""
    raw = layers.images.create(layers.folder / "raw", "8M", fmt="raw")
    layers.images.write_pattern(raw, 0, 8 * MIB, 0x77, "raw")
    words = {
        "-drive": f"if=none,id=fmt0,format=raw,discard=unmap,file={raw}",
        "-blockdev": f"raw,node-name=fmt0,discard=unmap,file.driver=file,file.filename={raw}",
    }
    vm = boot(disk, words[disk], *DEVICE)
    copy = layers.folder / "copy"
    async with connect(vm) as machine:
        await pivoted(machine, copy)
    before = os.stat(copy).st_blocks * 512
    vm.io("dev0", "discard 0 4M")
    vm.stop()
    assert before >= 8 * MIB
    assert os.stat(copy).st_blocks * 512 <= 5 * MIB


@pytest.mark.parametrize("wish", ["off", "on", "unmap"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_detect_zeroes(
    boot: Boot, connect: Connect, layers: Layers, fmt: str, wish: str
) -> None:
    options = f"if=virtio,format=qcow2,discard=unmap,detect-zeroes={wish},file={layers.snap2}"
    vm = boot("-drive", options)
    async with connect(vm) as machine:
        await pivoted(machine, layers.folder / "copy", format=fmt)
    wanted = "on" if (fmt, wish) == ("qcow2", "unmap") else wish
    assert device(vm)["inserted"]["detect_zeroes"] == wanted


@pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_a_disk_that_can_only_be_read(
    boot: Boot, connect: Connect, layers: Layers, fmt: str, *, shallow: bool
) -> None:
    if shallow and fmt == "raw":
        pytest.skip("raw has no backing file")
    expected = layers.content(layers.snap2)
    vm = boot("-drive", f"if=virtio,format=qcow2,read-only=on,file={layers.snap2}")
    async with connect(vm) as machine:
        await pivoted(machine, layers.folder / "copy", format=fmt, shallow=shallow)
    found = device(vm)
    assert found["inserted"]["image"]["filename"] == str(layers.folder / "copy")
    with pytest.raises(ImageError, match=r"[Rr]ead.only|not permitted|write"):
        vm.io(found["qdev"], "write -P 1 0 512")
    vm.stop()
    assert layers.content(layers.folder / "copy", fmt) == expected


ON_READ = {
    "-drive": ["-drive", "if=none,id=fmt0,format=qcow2,copy-on-read=on,file={}"],
    "filter": [
        *("-blockdev", "qcow2,node-name=top,file.driver=file,file.filename={}"),
        *("-blockdev", "copy-on-read,node-name=fmt0,file=top"),
    ],
}


@pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
@pytest.mark.parametrize("source", list(ON_READ))
async def test_copy_on_read_is_said_before_it_happens(
    boot: Boot, connect: Connect, layers: Layers, cli: Cli, source: str, *, shallow: bool
) -> None:
    vm = boot(*(word.format(layers.snap2) for word in ON_READ[source]), *DEVICE)
    depth = ["--shallow"] if shallow else []
    shown = cli("blockcopy", vm.qmp, "vda", layers.folder / "copy", "--print-qmp", *depth)
    before = layers.snap2.stat().st_blocks * 512
    async with connect(vm) as machine:
        plan = await machine.plan_blockcopy("vda", layers.folder / "copy", Options(shallow=shallow))
        copy = await machine.start(plan)
        await copy.ready()
        await copy.finish()
    vm.stop()
    grown = layers.snap2.stat().st_blocks * 512 - before
    if shallow:
        assert (plan.notes, shown.stderr) == ((), "")
        assert grown < 128 << 10
    else:
        (note,) = plan.notes
        assert "has copy-on-read" in note
        assert shown.stderr == f"note: {note}\n"
        assert grown >= 128 << 10  # what the two images below hold and this one did not


async def test_throttling_is_said_before_it_happens(
    boot: Boot, connect: Connect, layers: Layers, cli: Cli
) -> None:
    vm = boot(
        *("-object", "throttle-group,id=g0,x-iops-total=100000"),
        *("-blockdev", f"qcow2,node-name=top,file.driver=file,file.filename={layers.snap2}"),
        *("-blockdev", "throttle,node-name=fmt0,throttle-group=g0,file=top"),
        *DEVICE,
    )
    shown = cli("blockcopy", vm.qmp, "vda", layers.folder / "copy", "--print-qmp")
    async with connect(vm) as machine:
        plan = await machine.plan_blockcopy("vda", layers.folder / "copy", Options())
    (note,) = plan.notes
    assert "uses up the guest's share" in note
    assert shown.stderr == f"note: {note}\n"
