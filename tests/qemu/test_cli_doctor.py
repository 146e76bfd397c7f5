# SPDX-License-Identifier: MIT
"""``qmpmirror doctor``: what a bug report needs, and what looks wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror.testing import StorageDaemon
from qmpmirror.testing.process import sibling
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.testing import FakeMonitor, Qemu
    from qmpmirror.testing.launcher import MonitoredProcess
    from tests.qemu.conftest import Boot, Cli, Layers, Unchanged
    from tests.qemu.program import Scene

RUN = "abcdefgh"


@pytest.fixture
def doctor(cli: Cli) -> Callable[..., dict[str, Any]]:
    """What ``--json`` says; the page must not fail either."""

    def look(vm: MonitoredProcess | str) -> dict[str, Any]:
        socket = vm if isinstance(vm, str) else vm.qmp
        page = cli("doctor", socket)
        assert (page.returncode, page.stderr) == (0, "")
        told = cli("doctor", socket, "--json")
        checkup, result = map(json.loads, told.stdout.splitlines())
        assert (told.returncode, result["outcome"]) == (0, "done")
        for problem in checkup["problems"]:
            assert problem in page.stdout
        return dict(checkup)

    return look


def test_one_page_tells_all(scene: Scene, cli: Cli, unchanged: Unchanged) -> None:
    vm = scene.vm
    vm.execute(
        "block-dirty-bitmap-add", node="fmt0", name="nightly", granularity=65536, persistent=True
    )
    vm.execute("object-add", {"qom-type": "iothread", "id": "io0"})
    with unchanged(vm, scene.layers.folder):
        told = cli("doctor", vm.name)
    assert (told.returncode, told.stderr) == (0, "")
    for words in (
        f"QEMU        {'.'.join(map(str, vm.version))}",
        "machine     pc",
        ", x86_64, ",
        "tcg",
        f"guest       {vm.name}: ",
        "can:\n  blockdev-mirror, ",
        "disks:\n  vda = ",
        f"└─ {scene.source} [qcow2, 8.0 MiB",
        "<- vda (guest)",
        "jobs: none",
        "exports: none",
        "bitmaps:\n  nightly of fmt0: granularity 65536, 0 bytes dirty, persistent, recording",
        "iothreads:\n  io0\n",
        "nodes of ours: none",
    ):
        assert words in told.stdout


def test_a_healthy_guest_has_no_problem(
    boot: Boot, layers: Layers, doctor: Callable[..., dict[str, Any]]
) -> None:
    vm = boot("-drive", f"if=virtio,file={layers.snap2},format=qcow2")
    vm.execute("cont")
    assert doctor(vm)["problems"] == []


def test_a_copy_of_ours_is_taken_apart(scene: Scene, cli: Cli) -> None:
    scene.pin("--shallow", "--wait")
    job = scene.job["id"]
    told = cli("doctor", scene.vm.qmp.parent / "nobody")
    assert told.returncode == 3
    scene.programs[0].process.kill()
    scene.programs[0].end()
    told = cli("doctor", scene.vm.name)
    run = job.split("-")[2]
    assert f"{job}: mirror, running, " in told.stdout
    assert f"  ours: copy of fmt0, run {run}, " in told.stdout
    assert "shallow" in told.stdout
    assert f"nodes of ours:\n  qmpmirror-{run}-" in told.stdout


def test_an_asked_for_ending_that_nobody_saw_through(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    scene.pin("--shallow", "--wait").process.kill()
    run = scene.job["id"].split("-")[2]
    mark = {"node": f"qmpmirror-{run}-format", "name": f"qmpmirror-{run}-pivot"}
    scene.execute("block-dirty-bitmap-add", mark)
    problems = doctor(scene.vm)["problems"]
    assert f"run {run} has been asked to pivot, and is not put away yet" in problems


def test_nodes_and_objects_that_were_left_behind(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    node = {"driver": "null-co", "node-name": f"qmpmirror-{RUN}-format", "size": 1048576}
    scene.execute("blockdev-add", node)
    problems = doctor(scene.vm)["problems"]
    assert f"run {RUN} was interrupted before its job began: see qmpmirror recover" in problems
    scene.execute("blockdev-del", {"node-name": node["node-name"]})
    secret: dict[str, Any] = {
        "qom-type": "secret",
        "id": f"qmpmirror-{RUN}-secret",
        "data": "open sesame",
    }
    if scene.vm.version < (6, 0):
        secret["props"] = {"data": secret.pop("data")}
    scene.execute("object-add", secret)
    checkup = doctor(scene.vm)
    assert f"object {secret['id']} is left over from run {RUN}" in checkup["problems"]
    assert "sesame" not in json.dumps(checkup)


def mirror(scene: Scene, target: dict[str, Any], **options: Any) -> None:
    """A mirror that somebody else has started."""
    scene.execute("blockdev-add", {"node-name": "target", **target})
    arguments = {"job-id": "theirs", "device": "fmt0", "target": "target", "sync": "full"}
    dismissal = {"auto-dismiss": False}
    scene.execute("blockdev-mirror", {**arguments, **dismissal, **options})


NULL = {"driver": "null-co", "size": 8 * 1024 * 1024, "read-zeroes": True}


def test_a_job_that_an_io_error_has_stopped(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    rule = {"event": "none", "iotype": "write", "errno": 28}
    broken = {"driver": "blkdebug", "image": NULL, "inject-error": [rule]}
    mirror(scene, {"driver": "raw", "file": broken}, **{"on-target-error": "stop"})
    until(lambda: scene.find("theirs")["status"] == "paused")
    problems = doctor(scene.vm)["problems"]
    stopped = "job theirs has been stopped by an I/O error (nospace): make room, resume it"
    assert stopped in problems


def test_jobs_that_are_paused_pending_and_concluded(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    mirror(scene, NULL, **{"auto-finalize": False})
    scene.reaches("ready", "theirs")
    scene.execute("job-pause", id="theirs")
    scene.reaches("standby", "theirs")
    assert "job theirs is paused" in doctor(scene.vm)["problems"]
    scene.execute("job-resume", id="theirs")
    scene.reaches("ready", "theirs")
    scene.execute("block-job-cancel", device="theirs")
    scene.reaches("pending", "theirs")
    waits = "job theirs waits for job-finalize: the guest's writes to its disk wait too"
    assert waits in doctor(scene.vm)["problems"]
    scene.execute("job-finalize", id="theirs")
    scene.reaches("concluded", "theirs")
    ended = "job theirs has ended and nobody has dismissed it"
    assert ended in doctor(scene.vm)["problems"]


def test_a_copy_without_its_backing_node(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    name = f"qmpmirror-{RUN}-format"
    scene.execute("blockdev-add", {**NULL, "node-name": name})
    job = {"job-id": f"qmpmirror-copy-{RUN}-s-fmt0", "device": "fmt0", "target": name}
    scene.execute("blockdev-mirror", {**job, "sync": "top", "auto-dismiss": False})
    lacks = f"the copy of run {RUN} has no backing node: a pivot would lose data"
    assert lacks in doctor(scene.vm)["problems"]


def test_an_inconsistent_bitmap(
    boot: Boot, layers: Layers, doctor: Callable[..., dict[str, Any]]
) -> None:
    disk = ("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}")

    def start() -> Qemu:
        return boot(*disk, "-device", "virtio-blk-pci,drive=fmt0")

    vm = start()
    vm.execute("block-dirty-bitmap-add", node="fmt0", name="nightly", persistent=True)
    vm.execute("quit")
    until(lambda: not vm.running)
    vm = start()
    vm.kill()
    broken = "bitmap nightly of node fmt0 is inconsistent"
    assert broken in doctor(start())["problems"]


def test_a_storage_daemon(
    layers: Layers, qemu_binary: str, doctor: Callable[..., dict[str, Any]]
) -> None:
    disk = ("--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={layers.snap2}")
    binary = sibling(qemu_binary, "qemu-storage-daemon")
    with StorageDaemon(binary=binary, arguments=disk, directory=layers.folder.parent) as vm:
        checkup = doctor(vm)
    assert (checkup["machine"], checkup["status"], checkup["problems"]) == ("", "", [])
    assert [disk["names"] for disk in checkup["disks"]] == [f"disk = {layers.snap2}"]


async def test_a_qemu_whose_nodes_must_not_be_looked_at(
    scene: Scene, fake_monitor: Callable[..., FakeMonitor]
) -> None:
    mirror(scene, NULL)
    fake = fake_monitor(upstream=scene.vm.qmp, version=(5, 2, 0))
    fake.on(
        "query-jobs",
        [
            {
                "id": "saved",
                "type": "backup",
                "status": "concluded",
                "current-progress": 1,
                "total-progress": 1,
            }
        ],
    )
    async with fake:
        told = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmpmirror", "doctor", str(fake.path)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        page = (await told.communicate())[0].decode()
    assert told.returncode == 0
    assert "query-named-block-nodes" not in fake.commands
    assert "(the block graph could not be read)" in page
    assert "backup job saved is concluded and not dismissed" in page
    assert "hazard 8: " in page


def test_images_that_were_deleted_under_qemu(
    scene: Scene, doctor: Callable[..., dict[str, Any]]
) -> None:
    scene.layers.base.unlink()
    (problem,) = [p for p in doctor(scene.vm)["problems"] if "not there any more" in p]
    assert problem.startswith(f"image {scene.layers.base} is not there")


def test_the_files_of_snapshot_mode_are_no_problem(
    boot: Boot, layers: Layers, doctor: Callable[..., dict[str, Any]]
) -> None:
    vm = boot("-snapshot", "-drive", f"if=virtio,format=qcow2,file={layers.snap2}")
    assert not [p for p in doctor(vm)["problems"] if "not there any more" in p]
