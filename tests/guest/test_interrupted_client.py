# SPDX-License-Identifier: MIT
"""The client dies, or is cut off, at every single QMP command; a new process picks up what it left.

A real guest writes all the while, reads back what it wrote, and complains when it is not there.
After each time the guest must run on the image that is said to be its own, a finished copy must be
its disk at one instant, and nothing of ours may be left.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import Way, names
from qmpmirror.testing.guest import (
    Guest,
    Workload,
    acknowledged,
    check_image,
    check_point_in_time,
    errors,
    flatten,
    until_acknowledged,
)
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from qmpmirror import Finding
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

CLIENT = Path(__file__).with_name("interrupted_client.py")
SIZE = 16 * 1024 * 1024
KILLED = -9
CUT_OFF = 6
WORK = Workload(block_size=512, start=4096, blocks=2048, delay=1500, verify=8)
SCENARIOS = {
    "shallow-pivot": ("--shallow", "--pivot"),
    "full-finish": ("--finish",),
    "full-raw-pivot": ("--format", "raw", "--pivot"),
    "shallow-drive-mirror-pivot": ("--shallow", "--via", "drive-mirror", "--pivot"),
    "full-drive-mirror-finish": ("--via", "drive-mirror", "--finish"),
    "prepared-pivot": ("--shallow", "--reuse-external", "--pivot"),
}


@attrs.frozen
class Scene:
    """A booted guest on an overlay, and its disk as it was before."""

    vm: Qemu
    folder: Path
    before: Path

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def prepare(self, destination: Path) -> None:
        """What a user gets ready: an overlay on the base."""
        words = ["create", "-q", "-f", "qcow2", "-b", str(self.folder / "base"), "-F", "qcow2"]
        tool = sibling(self.vm.binary, "qemu-img")
        subprocess.run([tool, *words, str(destination)], check=True, stdin=subprocess.DEVNULL)

    async def flat(self, image: Path) -> Path:
        tool = sibling(self.vm.binary, "qemu-img")
        return await asyncio.to_thread(flatten, image, self.folder / "flat", qemu_img=tool)


@pytest.fixture
async def scene(qemu: QemuFactory, images: ImageTools, tmp_path: Path) -> Scene:
    images.create(tmp_path / "base", SIZE)
    images.io(tmp_path / "base", "write -P 0xb0 0 12M")
    images.create(tmp_path / "top", SIZE, backing=tmp_path / "base")
    images.io(tmp_path / "top", "write -P 0xb1 3M 1M")
    tool = sibling(images.qemu, "qemu-img")
    before = flatten(tmp_path / "top", tmp_path / "before", qemu_img=tool)
    storage = {"driver": "file", "filename": str(tmp_path / "top"), "node-name": "prot0"}
    node = {"driver": "qcow2", "node-name": "fmt0", "file": storage}
    vm = qemu(
        *("-m", "128", "-blockdev", json.dumps(node)),
        *("-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
        *Guest.find().arguments(serial=tmp_path / "serial", workload=WORK),
        machine="pc",
        name=None,
    )
    await asyncio.to_thread(vm.start)
    made = Scene(vm, tmp_path, before)
    await until_acknowledged(made.serial, 10)
    return made


async def run_client(
    scene: Scene, destination: Path, words: tuple[str, ...], number: int, *interruption: str
) -> tuple[bool, str]:
    """Run the command line; whether it was interrupted, and the last command that it got to."""
    log = scene.folder / "log"
    log.unlink(missing_ok=True)
    command = ["blockcopy", str(scene.vm.qmp), "vd0", str(destination), *words]
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(CLIENT), str(number), *interruption, str(log), *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
        text=True,
    )
    commands = log.read_text().splitlines()
    interrupted = len(commands) > number
    if not interrupted:
        assert run.returncode == 0, run.stderr
    elif interruption == ("kill", "after"):
        # A look at the progress that is given up in the end never gets its reply.
        given_up = run.returncode == 0 and commands[number].startswith("query-")
        assert run.returncode == KILLED or given_up, run.stderr
    elif interruption[0] == "kill":
        assert run.returncode == KILLED, run.stderr
    else:
        # After its last command nothing is left for it to lose.
        assert run.returncode in {CUT_OFF, 0}, run.stderr
        assert "lost" in run.stderr or "goes on" in run.stderr or run.returncode == 0
    return interrupted, commands[-1]


async def recover(vm: Qemu, way: Way) -> tuple[list[Finding], str]:
    """Recover in a new connection; what was found, and the image that the guest is said to use."""
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        return await machine.recover(way), (await machine.disk("vd0")).path


def check_nothing_is_left(vm: Qemu, path: str) -> None:
    assert vm.execute("query-jobs") == []
    assert vm.execute("query-status")["running"]
    nodes = vm.execute("query-named-block-nodes", flat=True)
    assert [b["name"] for n in nodes for b in n.get("dirty-bitmaps", ()) if b.get("name")] == []
    (drive,) = [d for d in vm.execute("query-block") if "virtio" in d.get("qdev", "")]
    active = names.parse_node(drive["inserted"]["node-name"])
    assert drive["inserted"]["image"]["filename"] == path
    allowed = {active[0]} if active else set()
    assert {p[0] for n in nodes if (p := names.parse_node(n["node-name"]))} == allowed
    others = {n["node-name"] for n in nodes if n["node-name"] in {"fmt0", "prot0"}}
    assert others == (set() if active else {"fmt0", "prot0"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", [Way.FINISH, Way.UNDO], ids=lambda way: way.value)
@pytest.mark.parametrize("words", list(SCENARIOS.values()), ids=list(SCENARIOS))
@pytest.mark.parametrize("how", ["kill", "cut"])
async def test_every_command_may_be_the_clients_last(
    scene: Scene, words: tuple[str, ...], way: Way, how: str, record_property: Any
) -> None:
    tried, interrupted, path = 0, True, ""
    while interrupted:
        number, moment = divmod(tried, 2)
        destination = scene.folder / f"copy{tried}"
        when = ("before", "after")[moment]
        prepared = "--reuse-external" in words
        if prepared:
            await asyncio.to_thread(scene.prepare, destination)
        before = acknowledged(scene.serial)
        interrupted, command = await run_client(scene, destination, words, number, how, when)
        findings, path = await recover(scene.vm, way)
        after = acknowledged(scene.serial)
        where = f"{how} {when} command {number}, {command}: {findings}"
        try:
            await asyncio.to_thread(check_nothing_is_left, scene.vm, path)
            await until_acknowledged(scene.serial, acknowledged(scene.serial) + 20)
            assert errors(scene.serial) == []
            # A prepared image is the user's: it stays, whatever the copy came to.
            if destination.exists() and str(destination) != path and not prepared:
                report = check_point_in_time(
                    await scene.flat(destination),
                    WORK,
                    before=before,
                    after=after,
                    base=scene.before,
                )
                assert report.problems == ()
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(where) from error
        tried += interrupted
    record_property("boundaries", tried)
    await asyncio.to_thread(scene.vm.kill)
    last = acknowledged(scene.serial)
    report = check_image(await scene.flat(Path(path)), WORK, acknowledged=last, base=scene.before)
    assert report.problems == ()
    sys.stdout.write(f"all {tried} boundaries were tried\n")
