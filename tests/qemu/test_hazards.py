# SPDX-License-Identifier: MIT
"""The ways in which a mirror silently loses data or kills QEMU, each met and survived.

The numbers are those of docs/hazards.md. What no QEMU to be had here does any more, or
not yet, is in test_hazards_elsewhere.py.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from qmpmirror import Copy, Machine
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

SLOW = 64 * 1024  # bytes/s: keeps a copy in the copying phase
MIB = 1024 * 1024


def sent(transcript: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    return [line["message"] for line in lines if line["direction"] == "sent"]


def arguments_of(transcript: Path, command: str) -> list[dict[str, Any]]:
    return [m.get("arguments", {}) for m in sent(transcript) if m["execute"] == command]


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    return tmp_path / "transcript"


@pytest.fixture
def vm(qemu: QemuFactory, qemu_chain: list[Path]) -> Qemu:
    """A QEMU on the top of a chain, by -blockdev and -device."""
    disk = {
        "driver": "qcow2",
        "node-name": "fmt0",
        "file": {"driver": "file", "node-name": "prot0", "filename": str(qemu_chain[-1])},
    }
    made = qemu(
        *("-blockdev", json.dumps(disk), "-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
        machine="pc",
        name=None,
    )
    made.start()
    return made


@pytest.fixture
async def machine(vm: Qemu, transcript: Path) -> AsyncIterator[Machine]:
    async with qmpmirror.connect(str(vm.qmp), transcript=transcript) as connected:
        yield connected


async def io(vm: Qemu, command: str) -> None:
    await asyncio.to_thread(vm.io, "vd0", command)


async def execute(vm: Qemu, command: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(lambda: vm.execute(command, **arguments))


async def backing_of_target(machine: Machine, copy: Copy) -> str:
    return (await machine.graph()).nodes[copy.target_node].child("backing")


async def test_1_target_has_its_backing_from_the_start(machine: Machine, tmp_path: Path) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True, bandwidth=SLOW)
    assert copy.phase is Phase.COPYING
    assert await backing_of_target(machine, copy) == copy.backing != ""
    await copy.abort()


@pytest.mark.qemu(">= 6.1")
async def test_1_no_switch_to_a_target_that_lost_its_backing(
    vm: Qemu, machine: Machine, tmp_path: Path, transcript: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    options = {
        "driver": "qcow2",
        "node-name": copy.target_node,
        "file": copy.target_node.replace("format", "storage"),
        "backing": None,
    }
    await execute(vm, "blockdev-reopen", options=[options])
    with pytest.raises(qmpmirror.JobError, match="lacks its backing node"):
        await copy.pivot()
    assert not arguments_of(transcript, "job-complete")
    await io(vm, "read -P 0x11 0 64k")
    await copy.abort(force=True)


@pytest.mark.parametrize("cluster_size", ["64k", "2M"])
@pytest.mark.parametrize("synchronous", [False, True], ids=["background", "write-blocking"])
async def test_2_and_3_writes_smaller_than_a_cluster_hide_nothing_of_the_base(
    qemu: QemuFactory,
    images: ImageTools,
    tmp_path: Path,
    *,
    cluster_size: str,
    synchronous: bool,
) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    images.create(base, 32 * MIB)
    images.io(base, "write -P 0xb0 0 32M")
    images.create(top, 32 * MIB, backing=base, options={"cluster_size": cluster_size})
    images.io(top, "write -P 0x70 8M 8M")
    disk = f"if=none,id=d,format=qcow2,file={top}"
    vm = qemu("-drive", disk, "-device", "virtio-blk-pci,drive=d,id=vd0", machine="pc", name=None)
    vm.start()
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        copy = await machine.blockcopy(
            "d",
            tmp_path / "copy",
            shallow=True,
            synchronous_writes=synchronous,
            bandwidth=SLOW,
            granularity=65536 if cluster_size == "2M" else 512,
        )
        assert copy.phase is Phase.COPYING
        await io(vm, "write -P 0x11 1M 512")  # copying, a cluster that only the base has
        await io(vm, "write -P 0x22 9M 4k")  # copying, a cluster of the top
        await copy.set_bandwidth(0)
        await copy.ready()
        await io(vm, "write -P 0x33 3145728 512")  # mirroring, a cluster that only the base has
        await copy.pivot()
        await io(vm, "write -P 0x44 5M 512")  # after the switch
    vm.stop()
    for offset, length, byte in (
        (0, MIB, 0xB0),
        (MIB, 512, 0x11),
        (MIB + 512, 2 * MIB - 512, 0xB0),
        (3 * MIB, 512, 0x33),
        (3 * MIB + 512, 2 * MIB - 512, 0xB0),
        (5 * MIB, 512, 0x44),
        (5 * MIB + 512, 3 * MIB - 512, 0xB0),
        (8 * MIB, MIB, 0x70),
        (9 * MIB, 4096, 0x22),
        (9 * MIB + 4096, 7 * MIB - 4096, 0x70),
        (16 * MIB, 16 * MIB, 0xB0),
    ):
        images.verify_pattern(tmp_path / "copy", offset, length, byte)


async def test_2_synchronous_writes_are_refused_where_they_would_corrupt(
    machine: Machine, tmp_path: Path, transcript: Path
) -> None:
    with pytest.raises(errors.Refused, match="would corrupt the copy"):
        await machine.blockcopy(
            "vd0", tmp_path / "copy", shallow=True, synchronous_writes=True, via="drive-mirror"
        )
    assert {message["execute"][:6] for message in sent(transcript)} <= {
        "query-",
        "qom-ge",
        "x-debu",
    }


async def test_4_drive_mirror_switches_even_when_the_base_cannot_be_opened_again(
    vm: Qemu, machine: Machine, tmp_path: Path, qemu_chain: list[Path], transcript: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True, via="drive-mirror")
    await copy.ready()
    hidden = tmp_path / "hidden"
    os.rename(qemu_chain[0], hidden)
    result = await copy.pivot()
    assert result.outcome is Phase.PIVOTED
    assert arguments_of(transcript, "drive-mirror")[0]["mode"] == "absolute-paths"
    await io(vm, "read -P 0x11 0 64k")  # data of the base
    os.rename(hidden, qemu_chain[0])


async def test_5_shallow_without_a_backing_file_is_a_full_copy(
    qemu: QemuFactory, images: ImageTools, tmp_path: Path, transcript: Path
) -> None:
    images.create(tmp_path / "one", MIB)
    vm = qemu("-drive", f"if=virtio,format=qcow2,file={tmp_path / 'one'}", machine="pc", name=None)
    vm.start()
    async with qmpmirror.connect(str(vm.qmp), transcript=transcript) as machine:
        copy = await machine.blockcopy("vda", tmp_path / "copy", shallow=True)
        await copy.ready()
        await copy.finish()
    assert arguments_of(transcript, "blockdev-mirror")[0]["sync"] == "full"


async def test_6_job_complete_is_sent_once_whatever_blips(
    vm: Qemu, machine: Machine, tmp_path: Path, transcript: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    for _ in range(5):  # each drains all nodes: ready, standby, ready
        await execute(vm, "stop")
        await execute(vm, "cont")
    assert copy.phase is Phase.MIRRORING
    endings = await asyncio.gather(copy.pivot(), copy.pivot(), return_exceptions=True)
    with pytest.raises(qmpmirror.EndingAlreadyAsked):
        await copy.pivot()
    assert sorted(type(ending).__name__ for ending in endings) == ["EndingAlreadyAsked", "Result"]
    assert len(arguments_of(transcript, "job-complete")) == 1


async def test_6_replaces_is_sent_only_for_a_filter(
    machine: Machine, tmp_path: Path, transcript: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.abort()
    assert "replaces" not in arguments_of(transcript, "blockdev-mirror")[0]


@pytest.mark.qemu("< 6")
async def test_8_a_concluded_backup_job_does_not_make_us_crash_qemu(
    vm: Qemu, machine: Machine, images: ImageTools, tmp_path: Path
) -> None:
    images.create(tmp_path / "backup", 64 * MIB)
    await execute(vm, "block-dirty-bitmap-add", node="fmt0", name="b")
    target = {"driver": "file", "filename": str(tmp_path / "backup")}
    await execute(vm, "blockdev-add", driver="qcow2", node_name="bak", file=target)
    await execute(
        vm,
        "blockdev-backup",
        **{"job-id": "backup0", "device": "fmt0", "target": "bak", "sync": "bitmap"},
        bitmap="b",
        bitmap_mode="on-success",
        auto_dismiss=False,
    )
    while (await execute(vm, "query-jobs"))[0]["status"] != "concluded":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with pytest.raises(errors.Refused, match=r"job-dismiss.*backup0"):
        await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await execute(vm, "job-dismiss", id="backup0")
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.abort()


@pytest.mark.qemu("< 6")
async def test_9_a_writer_behind_the_mirror_stops_the_pivot_not_qemu(
    vm: Qemu, machine: Machine, tmp_path: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    await execute(vm, "nbd-server-start", addr=address)
    await execute(
        vm, "block-export-add", type="nbd", id="e", node_name="fmt0", name="e", writable=True
    )
    with pytest.raises(qmpmirror.JobError, match="writes to node fmt0 behind the mirror"):
        await copy.pivot()
    await execute(vm, "block-export-del", id="e", mode="hard")
    while await execute(vm, "query-block-exports"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await copy.pivot()).outcome is Phase.PIVOTED


@pytest.mark.qemu(">= 7")
async def test_9_newer_qemu_itself_refuses_a_writer_behind_the_mirror(
    vm: Qemu, machine: Machine, tmp_path: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    await execute(vm, "nbd-server-start", addr=address)
    with pytest.raises(Exception, match=r"[Pp]ermission|[Cc]onflict"):
        await execute(
            vm, "block-export-add", type="nbd", id="e", node_name="fmt0", name="e", writable=True
        )
    assert (await copy.pivot()).outcome is Phase.PIVOTED


async def test_10_a_lone_job_finalizes_itself(
    machine: Machine, tmp_path: Path, transcript: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.abort()
    (mirror,) = arguments_of(transcript, "blockdev-mirror")
    assert mirror["auto-finalize"] is True
    assert mirror["auto-dismiss"] is False


async def test_11_a_job_that_ended_without_error_is_not_taken_for_a_pivot(
    vm: Qemu, machine: Machine, tmp_path: Path, qemu_chain: list[Path]
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    await execute(vm, "block-job-cancel", device=copy.id)
    await asyncio.wait_for(copy.job.wait(lambda life: life.concluded), 30)
    result = await copy.pivot()
    assert result.outcome is Phase.FINISHED
    assert result.active == str(qemu_chain[-1])
    assert result.consistent
    assert (await machine.disk("vd0")).path == str(qemu_chain[-1])


async def test_11_somebody_elses_pivot_is_reported_as_a_pivot(
    vm: Qemu, machine: Machine, tmp_path: Path
) -> None:
    copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
    await copy.ready()
    await execute(vm, "job-complete", id=copy.id)
    await asyncio.wait_for(copy.job.wait(lambda life: life.concluded), 30)
    result = await copy.finish()
    assert result.outcome is Phase.PIVOTED
    assert result.active == str(tmp_path / "copy")
    assert "fmt0" not in (await machine.graph()).nodes


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.MIRRORING])
async def test_11_unplugging_a_drive_is_no_pivot(
    qemu: QemuFactory, qemu_chain: list[Path], tmp_path: Path, phase: Phase
) -> None:
    vm = qemu(
        *("-drive", f"if=none,id=d,format=qcow2,file={qemu_chain[-1]}"),
        *("-device", "virtio-blk-pci,drive=d,id=vd0"),
        *("-device", "qemu-xhci,id=usb", "-device", "usb-storage,drive=u,bus=usb.0,id=stick"),
        *("-drive", f"if=none,id=u,format=qcow2,read-only=on,file={qemu_chain[0]}"),
        machine="pc",
        name=None,
    )
    # usb-storage can be unplugged without a guest that agrees.
    vm.start()
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        slow = SLOW if phase is Phase.COPYING else 0
        copy = await machine.blockcopy("u", tmp_path / "copy", bandwidth=slow)
        if phase is Phase.MIRRORING:
            await copy.ready()
        await execute(vm, "device_del", id="stick")
        await asyncio.wait_for(copy.job.wait(lambda life: life.concluded), 30)
        with pytest.raises(qmpmirror.JobFailed) as failure:
            await (copy.pivot() if phase is Phase.MIRRORING else copy.ready())
        assert failure.value.authoritative == ""
        assert not await machine.jobs()
        assert copy.target_node not in (await machine.graph()).nodes


@pytest.mark.parametrize("detect", ["on", "unmap"])
async def test_13_no_detect_zeroes_unmap_on_a_qcow2_target(
    qemu: QemuFactory, qemu_chain: list[Path], tmp_path: Path, transcript: Path, detect: str
) -> None:
    vm = qemu(
        *(
            "-drive",
            f"if=virtio,format=qcow2,discard=unmap,detect-zeroes={detect},file={qemu_chain[-1]}",
        ),
        machine="pc",
        name=None,
    )
    vm.start()
    async with qmpmirror.connect(str(vm.qmp), transcript=transcript) as machine:
        copy = await machine.blockcopy("vda", tmp_path / "copy", shallow=True)
        await copy.abort()
    added = arguments_of(transcript, "blockdev-add")[-1]
    assert (added["driver"], added["detect-zeroes"]) == ("qcow2", "on")
