# SPDX-License-Identifier: MIT
"""The client of a verb dies at every single QMP command; a new process picks up what it left.

So may that process: the next one picks up what it left. A real guest writes all the while. After
each time it must run on the image that is said to be its own, and QEMU must have nothing open that
is not in its chain.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import ActiveCommit, Machine, Way
from qmpmirror.testing.guest import (
    Guest,
    acknowledged,
    check_image,
    check_point_in_time,
    errors,
    flatten,
    until_acknowledged,
)
from qmpmirror.testing.process import sibling
from tests.guest.test_interrupted_client import CLIENT, KILLED, SIZE, WORK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from qmpmirror.graph import Graph
    from qmpmirror.testing.images import ImageTools
    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory


@attrs.define
class Scene:
    """A booted guest on an overlay, and its disk as it was before."""

    vm: Qemu
    folder: Path
    before: Path
    turn: int = 0

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def new(self, name: str) -> Path:
        """A path that nothing has used yet."""
        return self.folder / f"{name}{self.turn}"


@pytest.fixture
async def scene(qemu: QemuFactory, images: ImageTools, tmp_path: Path) -> Scene:
    folder = tmp_path / "first"
    folder.mkdir()
    images.create(folder / "base", SIZE)
    images.io(folder / "base", "write -P 0xb0 0 12M")
    images.create(folder / "top", SIZE, backing=folder / "base")
    images.io(folder / "top", "write -P 0xb1 3M 1M")
    tool = sibling(images.qemu, "qemu-img")
    before = flatten(folder / "top", tmp_path / "before", qemu_img=tool)
    nodes: list[dict[str, Any]] = []
    for name, backing in (("base", None), ("top", "base")):
        node: dict[str, Any] = {"driver": "qcow2", "node-name": name, "backing": backing}
        node["file"] = {"driver": "file", "filename": str(folder / name)}
        nodes.append(node)
    vm = qemu(
        *("-m", "128"),
        *(word for node in nodes for word in ("-blockdev", json.dumps(node))),
        *("-device", "virtio-blk-pci,drive=top,id=vd0"),
        *Guest.find().arguments(serial=tmp_path / "serial", workload=WORK),
        machine="pc",
        name=None,
    )
    await asyncio.to_thread(vm.start)
    made = Scene(vm, tmp_path, before)
    await until_acknowledged(made.serial, 10)
    return made


def below(picture: Graph, root: str) -> set[str]:
    """A node and all that is below it."""
    found, todo = set[str](), [root]
    while todo:
        name = todo.pop()
        found.add(name)
        todo += [child for _, child in picture.nodes[name].children]
    return found


async def chain_of(machine: Machine) -> list[str]:
    """The paths of the images under the guest, the active one first."""
    picture, disk = await machine.graph(), await machine.disk("vd0")
    return [picture.path(image.name) for image in picture.chain(disk.node)]


async def normalize(scene: Scene, machine: Machine, layers: int) -> list[str]:
    """Make the chain as long as a scenario wants it to be."""
    chain = await chain_of(machine)
    while len(chain) > layers:
        commit = await machine.blockcommit("vd0", active=True, shallow=True, delete=True)
        assert isinstance(commit, ActiveCommit)
        await commit.ready()
        await commit.pivot()
        chain = await chain_of(machine)
    while len(chain) < layers:
        await machine.snapshot({"vd0": scene.new(f"layer{len(chain)}-")})
        await until_acknowledged(scene.serial, acknowledged(scene.serial) + 5)
        chain = await chain_of(machine)
    return chain


async def copied(scene: Scene, machine: Machine) -> list[str]:
    await normalize(scene, machine, 2)
    return ["blockcopy", str(scene.vm.qmp), "vd0", str(scene.new("copy")), "--shallow", "--pivot"]


async def finished(scene: Scene, machine: Machine) -> list[str]:
    await normalize(scene, machine, 2)
    return ["blockcopy", str(scene.vm.qmp), "vd0", str(scene.new("copy")), "--finish"]


async def moved(scene: Scene, machine: Machine) -> list[str]:
    for old in scene.folder.glob("moved*"):
        if not (await chain_of(machine))[0].startswith(f"{old}/"):
            shutil.rmtree(old)
    scene.new("moved").mkdir()
    await normalize(scene, machine, 2)
    return ["move-storage", str(scene.vm.qmp), "vd0", str(scene.new("moved"))]


async def snapped(scene: Scene, machine: Machine) -> list[str]:
    await normalize(scene, machine, 2)
    overlay = f"vd0,file={scene.new('overlay')}"
    socket = str(scene.vm.qmp)
    return ["snapshot-create-as", socket, "--disk-only", "--diskspec", overlay]


async def committed(scene: Scene, machine: Machine) -> list[str]:
    await normalize(scene, machine, 3)
    return ["blockcommit", str(scene.vm.qmp), "vd0", "--active", "--shallow", "--pivot"]


async def inner_committed(scene: Scene, machine: Machine) -> list[str]:
    _, top, base, *_ = await normalize(scene, machine, 4)
    return ["blockcommit", str(scene.vm.qmp), "vd0", "--top", top, "--base", base, "--wait"]


async def pulled(scene: Scene, machine: Machine) -> list[str]:
    *_, base = await normalize(scene, machine, 3)
    return ["blockpull", str(scene.vm.qmp), "vd0", "--base", base, "--wait"]


async def imaged(scene: Scene, machine: Machine) -> list[str]:
    await normalize(scene, machine, 2)
    return ["image-create", str(scene.vm.qmp), "vd0", str(scene.new("image"))]


SCENARIOS: list[Callable[[Scene, Machine], Awaitable[list[str]]]] = [
    moved,
    snapped,
    committed,
    inner_committed,
    pulled,
    imaged,
]
RECOVERED = [copied, finished, *SCENARIOS]
STRIDE = 11  # odd: both moments of a command have their turn


async def run_client(scene: Scene, words: list[str], number: int, when: str) -> tuple[bool, str]:
    """Run the command line; whether it was killed, and the last command that it got to."""
    log = scene.folder / "log"
    log.unlink(missing_ok=True)
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(CLIENT), str(number), "kill", when, str(log), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
        text=True,
    )
    commands = log.read_text().splitlines()
    killed = len(commands) > number
    # A look at the progress that is given up in the end never gets its reply.
    given_up = when == "after" and killed and commands[number].startswith("query-")
    assert run.returncode == (KILLED if killed else 0) or given_up, run.stderr
    return killed, commands[-1]


async def check_nothing_is_left(scene: Scene, machine: Machine) -> None:
    picture, disk = await machine.graph(), await machine.disk("vd0")
    assert await machine.jobs() == []
    assert scene.vm.execute("query-jobs") == []
    assert scene.vm.execute("query-status")["running"]
    assert [b.name for node in picture.nodes.values() for b in node.bitmaps if b.name] == []
    assert set(picture.nodes) == below(picture, disk.node)
    folder = scene.new("moved")
    if folder.exists():
        names = {path.name for path in folder.iterdir()}
        assert names == ({"base", "top"} if disk.path.startswith(f"{folder}/") else set())
    assert not list(scene.folder.glob("*.part"))


async def recover(scene: Scene, way: Way, where: str) -> str:
    """Recover in this process, and look that all is well; return the guest's active image."""
    before = acknowledged(scene.serial)
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        findings = await machine.recover(way)
        path = (await chain_of(machine))[0]
        try:
            await check_nothing_is_left(scene, machine)
            await until_acknowledged(scene.serial, before + 20)
            assert errors(scene.serial) == []
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"{where}: {findings}") from error
    return path


async def check_copy(scene: Scene, path: str, before: int) -> None:
    """A copy that is there is the guest's own, or its disk at one instant."""
    copy = scene.new("copy")
    if copy.exists() and str(copy) != path:
        flat = scene.folder / "flat"
        await asyncio.to_thread(flatten, copy, flat, qemu_img=sibling(scene.vm.binary, "qemu-img"))
        after = acknowledged(scene.serial)
        report = check_point_in_time(flat, WORK, before=before, after=after, base=scene.before)
        assert report.problems == ()


async def check_runs_on(scene: Scene, path: str) -> None:
    """End QEMU as a power cut would; the image must have all that the guest was told."""
    await asyncio.to_thread(scene.vm.kill)
    last = acknowledged(scene.serial)
    tool = sibling(scene.vm.binary, "qemu-img")
    flat = flatten(scene.folder / path, scene.folder / "flat", qemu_img=tool)
    report = check_image(flat, WORK, acknowledged=last, base=scene.before)
    assert report.problems == ()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", [Way.FINISH, Way.UNDO], ids=lambda way: way.value)
@pytest.mark.parametrize("prepare", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_every_command_may_be_the_clients_last(
    scene: Scene, prepare: Callable[[Scene, Machine], Awaitable[list[str]]], way: Way
) -> None:
    killed, path = True, ""
    while killed:
        number, moment = divmod(scene.turn, 2)
        when = ("before", "after")[moment]
        async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
            words = await prepare(scene, machine)
        killed, command = await run_client(scene, words, number, when)
        path = await recover(scene, way, f"{when} command {number}, {command}")
        scene.turn += killed
    await check_runs_on(scene, path)
    sys.stdout.write(f"all {scene.turn} boundaries were tried\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", [Way.FINISH, Way.UNDO], ids=lambda way: way.value)
@pytest.mark.parametrize("prepare", RECOVERED, ids=lambda scenario: scenario.__name__)
async def test_every_command_may_be_the_last_of_recover(
    scene: Scene, prepare: Callable[[Scene, Machine], Awaitable[list[str]]], way: Way
) -> None:
    again = ["recover", str(scene.vm.qmp), f"--{way.value}"]
    killed, path, first = True, "", 0
    while killed:
        recovering, number = True, 0
        while recovering and killed:
            async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
                words = await prepare(scene, machine)
            before = acknowledged(scene.serial)
            when = ("before", "after")[first % 2]
            killed, command = await run_client(scene, words, first // 2, when)
            where = f"{when} command {first // 2}, {command}"
            when = ("before", "after")[(first + number) % 2]
            recovering, command = await run_client(scene, again, number, when)
            where += f"; of recover {when} command {number}, {command}"
            path = await recover(scene, way, where)
            if prepare is not finished:
                assert path == str(scene.new("copy")) or not scene.new("copy").exists(), where
            await check_copy(scene, path, before)
            number += 1
            scene.turn += 1
        first += STRIDE
    await check_runs_on(scene, path)
    sys.stdout.write(f"{scene.turn} pairs of boundaries were tried\n")
