# SPDX-License-Identifier: MIT
"""``qmpmirror recover`` among things that are not ours, without a disk, and before the job runs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror.testing.graph import GraphSnapshot
from tests.qemu.program import HINT, PINNED, until

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers, Unchanged

DISK = (
    *("-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"),
    *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
)
SPARE = (
    *("-blockdev", "qcow2,node-name=fmt1,file.driver=file,file.filename={}"),
    *("-device", "virtio-blk-pci,drive=fmt1,id=dev1"),
)


@pytest.fixture
def spare(layers: Layers) -> Path:
    made = layers.images.create(layers.folder / "spare", "8M")
    layers.images.write_pattern(made, 0, 4 << 20, 0x77)
    return made


@pytest.fixture
def vm(boot: Boot, layers: Layers, spare: Path) -> Qemu:
    """Its ``vda`` runs on ``snap2``, its ``vdb`` on ``spare``."""
    words = [word.format(layers.snap2) for word in DISK]
    words += [word.format(spare) for word in SPARE]
    return boot(*words, name=f"recover-{os.urandom(6).hex()}")


NODES = (
    "qmpmirror",
    "qmpmirror-abc",
    "qmpmirror-abcdefg-format",
    "qmpmirror-abcdefgh",
    "qmpmirror-abcdefgh-",
    "qmpmirror-abcdefgh-format2",
    "qmpmirror-abcdefghi-format",
    "qmpmirror-ABCDEFGH-format",
    "qmpmirror-abcdefgh.format",
    "qmpmirrorX-abcdefgh-format",
    "Xqmpmirror-abcdefgh-format",
    "qmpmirror_abcdefgh-format",
)
JOBS = (
    "qmpmirror",
    "qmpmirror-copy",
    "qmpmirror-copy-abcdefg-sc-fmt1",
    "qmpmirror-copy-abcdefghi-sc-fmt1",
    "qmpmirror-copy-ABCDEFGH-sc-fmt1",
    "qmpmirror-create-abcdefgh",
    "qmpmirror-Copy-abcdefgh-sc-fmt1",
    "qmpmirrorX-copy-abcdefgh-sc-fmt1",
    "Xqmpmirror-create-abcdefgh-c-fmt1",
    "copy-abcdefgh-sc-fmt1",
)
BITMAPS = ("qmpmirror-abcdefgh-pivot", "qmpmirror-abcdefgh-stopped", "qmpmirror-pivot", "abort")


def surround(vm: Qemu, folder: Path) -> None:
    """Fill a QEMU with nodes, jobs, bitmaps and exports whose names are much like ours."""
    for name in NODES:
        vm.execute("blockdev-add", driver="null-co", node_name=name, size=1 << 20, read_zeroes=True)
        for bitmap in BITMAPS:
            vm.execute("block-dirty-bitmap-add", node=name, name=bitmap)
    for bitmap in BITMAPS:
        for node in ("fmt0", "fmt1"):
            vm.execute("block-dirty-bitmap-add", node=node, name=bitmap)
    for number, job in enumerate(JOBS):
        # A concluded job stays until its owner dismisses it.
        options = {"driver": "file", "filename": str(folder / f"file{number}"), "size": 0}
        vm.execute("blockdev-create", job_id=job, options=options)
        until(lambda: {job["status"] for job in vm.execute("query-jobs")} == {"concluded"})
    vm.execute(
        "blockdev-mirror",
        {"job-id": "qmpmirror-abcdefgh-format", "device": "fmt1", "target": theirs(vm, folder)},
        sync="full",
        speed=1,
        buf_size=65536,
    )
    address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
    vm.execute("nbd-server-start", addr=address)
    for export, node in (("qmpmirror-abcdefgh", "fmt0"), ("qmpmirror-export", "qmpmirror-abc")):
        vm.execute("block-export-add", type="nbd", id=export, node_name=node, name=export)


def theirs(vm: Qemu, folder: Path) -> str:
    name = "qmpmirror-abcdefghijkl-storage"
    path = str(folder / "theirs")
    vm.images.create(path, "8M", "raw")
    vm.execute("blockdev-add", driver="file", node_name=name, filename=path)
    return name


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("options", ["", "--finish", "--undo"])
def test_things_with_similar_names_are_nothing_to_recover(
    vm: Qemu, cli: Cli, foreign: Path, unchanged: Unchanged, options: str
) -> None:
    surround(vm, foreign)
    vm.execute("stop")
    with unchanged(vm, foreign):
        ran = cli("recover", vm.name, *options.split())
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("Nothing to recover\n")
    assert not vm.execute("query-status")["running"]


@pytest.mark.parametrize("ending", ["pivot", "undo"])
def test_things_with_similar_names_outlive_what_is_ours(
    vm: Qemu, layers: Layers, cli: Cli, foreign: Path, ending: str
) -> None:
    copy = layers.folder / "copy.qcow2"
    surround(vm, foreign)
    started = cli("blockcopy", vm.name, "vda", copy, "--shallow", "--wait")
    assert started.returncode == 0, started.stderr
    before = GraphSnapshot.take(vm.execute)
    (job,) = [job["id"] for job in vm.execute("query-jobs") if job["status"] == "ready"]
    if ending == "pivot":
        vm.execute("job-complete", id=job)
        until(lambda: {"id": job, "status": "concluded"}.items() <= find(vm, job).items())
    ran = cli("recover", vm.name, "--undo")
    action = "pivoted" if ending == "pivot" else "aborted: the incomplete copy was removed"
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0].endswith(f": {action}")
    run = job.split("-")[2]
    changes = before.differences(GraphSnapshot.take(vm.execute))
    ours = (f"qmpmirror-{run}", f"qmpmirror-copy-{run}", "fmt0", str(layers.snap2), "mirror_top")
    assert [change for change in changes if not any(name in change for name in ours)] == []
    assert find(vm, "qmpmirror-abcdefgh-format")["status"] == "running"


def find(vm: Qemu, job: str) -> dict[str, Any]:
    return next(dict(found) for found in vm.execute("query-jobs") if found["id"] == job)


@pytest.mark.parametrize("options", ["", "--finish", "--undo"])
@pytest.mark.parametrize("mirroring", [False, True], ids=["copying", "mirroring"])
@pytest.mark.parametrize("attached", ["drive", "blockdev"])
def test_disk_that_was_unplugged_meanwhile(
    boot: Boot, layers: Layers, cli: Cli, attached: str, options: str, *, mirroring: bool
) -> None:
    disk = {
        "drive": ("-drive", f"if=none,id=stick,format=qcow2,file={layers.snap2}"),
        "blockdev": [word.format(layers.snap2) for word in DISK[:2]],
    }[attached]
    node = "stick" if attached == "drive" else "fmt0"
    # It can be unplugged without a guest that agrees.
    usb = ("-device", "qemu-xhci,id=usb", "-device", f"usb-storage,drive={node},bus=usb.0,id=dev")
    vm = boot(*disk, *usb, name=f"recover-{os.urandom(6).hex()}")
    copy = layers.folder / "copy.qcow2"
    pinned = ("--wait",) if mirroring else PINNED
    assert cli("blockcopy", vm.name, "dev", copy, "--shallow", *pinned).returncode == 0
    vm.execute("device_del", id="dev")
    until(lambda: not [d for d in vm.execute("query-block") if "usb" in d.get("qdev", "")])
    if attached == "drive":  # QEMU has cancelled it
        until(lambda: vm.execute("query-jobs")[0]["status"] == "concluded")
    elif options == "--finish" and not mirroring:
        vm.execute("block-job-set-speed", device=vm.execute("query-jobs")[0]["id"], speed=0)
    ran = cli("recover", vm.name, *options.split())
    assert (ran.returncode, ran.stderr.replace(HINT, "")) == (0, ""), ran.stdout
    failed = "put away: it had failed: "
    action = {
        ("drive", ""): f"{failed}the disk has another image now, or is gone",
        ("blockdev", ""): "left running",
        ("blockdev", "--finish"): "finished: the copy is consistent",
        ("blockdev", "--undo"): "aborted: the incomplete copy was removed",
    }[attached, options if attached == "blockdev" else ""]
    if attached == "drive" and not mirroring:
        action = f"{failed}Operation canceled"
    assert ran.stdout.splitlines()[0].endswith(f": {action}")
    runs = action == "left running"
    if runs:
        assert cli("recover", vm.name, "--undo").returncode == 0
    assert vm.execute("query-jobs") == []
    nodes = vm.execute("query-named-block-nodes")
    assert not [n["node-name"] for n in nodes if n["node-name"].startswith("qmpmirror-")]


@pytest.mark.parametrize("options", ["", "--finish", "--undo"])
@pytest.mark.parametrize("words", ["--shallow", "--raw", "--via drive-mirror"])
def test_start_that_stopped_after_each_command_is_undone(
    vm: Qemu, layers: Layers, cli: Cli, unchanged: Unchanged, words: str, options: str
) -> None:
    """What a client sends before it dies is sent by hand: a little more each time."""
    copy = layers.folder / "copy.qcow2"
    tried, commands = 0, [""]
    while tried <= len(commands):
        planned = cli("blockcopy", vm.name, "vda", copy, "--print-qmp", *words.split(), *PINNED)
        every = [json.loads(line) for line in planned.stdout.splitlines()]
        names = [command["execute"] for command in every]
        commands = names[: names.index(next(name for name in names if "mirror" in name))]
        with unchanged(vm, layers.folder):
            for command in every[:tried]:
                vm.execute(command["execute"], command["arguments"])
                if command["execute"] == "blockdev-create":
                    job = command["arguments"]["job-id"]
                    until(lambda: find(vm, job)["status"] == "concluded")  # noqa: B023
            ran = cli("recover", vm.name, *options.split())
            assert (ran.returncode, ran.stderr) == (0, "")
            said = ran.stdout.splitlines()[0]
            undone = f"copy to {copy}, creating the image: undone, and the file was removed"
            assert said == (undone if tried else "Nothing to recover")
        tried += 1
    assert commands[0] == "blockdev-create"
    assert len(commands) > 2
