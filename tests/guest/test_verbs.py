# SPDX-License-Identifier: MIT
"""A real Linux guest writes all the while its chain is moved, grows, shrinks, and is copied.

Whatever it was told to be stable must be on the image that it runs on; and what was made of its
disk must be that disk at one instant.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import qmpmirror
from qmpmirror import ActiveCommit, InnerCommit, Phase
from qmpmirror.testing.guest import acknowledged

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror import Machine
    from tests.guest.live import Scene

SLOW = 256 * 1024


async def chain_of(machine: Machine) -> list[str]:
    """The names of the images under the guest, the active one first."""
    picture, disk = await machine.graph(), await machine.disk("vda")
    return [picture.path(image.name).rpartition("/")[2] for image in picture.chain(disk.node)]


async def snapshot(scene: Scene, machine: Machine, name: str) -> Path:
    overlay = scene.folder / name
    await machine.snapshot({"vda": overlay})
    await scene.more_writes()
    return overlay


async def test_moved_with_its_chain(scene: Scene) -> None:
    new = scene.folder / "new"
    new.mkdir()
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        move = await machine.move_storage("vda", new, bandwidth=SLOW)
        await scene.more_writes()
        assert move.phase is Phase.COPYING
        await move.set_bandwidth(0)
        assert await move.ready()
        await scene.more_writes()
        before = acknowledged(scene.serial)
        result = await move.pivot()
        after = acknowledged(scene.serial)
        assert (result.active, result.left) == (str(new / "snap2"), ())
        assert await chain_of(machine) == ["snap2", "snap1", "base"]
        nodes = (await machine.graph()).nodes.values()
        assert all(str(new) in node.filename for node in nodes if node.driver == "qcow2")
    await scene.check_instant(scene.top, before, after)
    for path in (scene.folder / "base", scene.folder / "snap1", scene.top):
        path.unlink()
    await scene.check_runs_on(new / "snap2")


async def test_moved_by_hand(scene: Scene) -> None:
    """The same in steps, over a temporary overlay."""
    new, names = scene.folder / "new", ("base", "snap1", "snap2")
    new.mkdir()
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        await snapshot(scene, machine, "overlay")
        below = None
        for name in names:
            data = await asyncio.to_thread((scene.folder / name).read_bytes)
            await asyncio.to_thread((new / name).write_bytes, data)
            if below is not None:
                await asyncio.to_thread(scene.rebase, new / name, below)
            below = new / name
        await asyncio.to_thread(scene.overlay, new / "overlay", new / "snap2")
        copy = await machine.blockcopy(
            "vda", new / "overlay", shallow=True, reuse_external=True, check_base=True
        )
        await copy.ready()
        await scene.more_writes()
        await copy.pivot()
        commit = await machine.blockcommit("vda", active=True, shallow=True, delete=True)
        assert isinstance(commit, ActiveCommit)
        await commit.ready()
        await scene.more_writes()
        assert (await commit.pivot()).active == str(new / "snap2")
        assert await chain_of(machine) == ["snap2", "snap1", "base"]
    for name in names:
        (scene.folder / name).unlink()
    await scene.check_runs_on(new / "snap2")


async def test_snapshot_then_committed_back(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        await scene.more_writes()
        before = acknowledged(scene.serial)
        await machine.snapshot({"vda": scene.folder / "overlay"})
        after = acknowledged(scene.serial)
        await scene.check_instant(scene.top, before, after)
        await scene.more_writes()
        commit = await machine.blockcommit("vda", active=True, base=str(scene.folder / "snap1"))
        assert isinstance(commit, ActiveCommit)
        await commit.ready()
        await scene.more_writes()
        assert (await commit.pivot()).left == ()
        assert await chain_of(machine) == ["snap1", "base"]
    await scene.check_runs_on(scene.folder / "snap1")


async def test_images_in_the_middle_are_committed(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        await snapshot(scene, machine, "over1")
        active = await snapshot(scene, machine, "over2")
        commit = await machine.blockcommit(
            "vda", top=str(scene.folder / "over1"), base=str(scene.folder / "snap1")
        )
        assert isinstance(commit, InnerCommit)
        assert await commit.end()
        assert await chain_of(machine) == ["over2", "snap1", "base"]
    await scene.check_runs_on(active)


async def test_pulled_into_one_image(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        active = await snapshot(scene, machine, "over1")
        pull = await machine.blockpull("vda", base=str(scene.folder / "base"))
        assert await pull.end()
        assert await chain_of(machine) == ["over1", "base"]
        await scene.more_writes()
        pull = await machine.blockpull("vda")
        assert await pull.end()
        assert await chain_of(machine) == ["over1"]
    await scene.check_runs_on(active)


async def test_one_image_of_one_instant(scene: Scene) -> None:
    image = scene.folder / "image"
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        await scene.more_writes()
        before = acknowledged(scene.serial)
        made = await machine.image_create("vda", image, compress=True)
        after = acknowledged(scene.serial)
        assert (made.image, made.source) == (str(image), str(scene.top))
        assert await chain_of(machine) == ["snap2", "snap1", "base"]
    await scene.check_instant(image, before, after)
    await scene.check_runs_on(scene.top)
