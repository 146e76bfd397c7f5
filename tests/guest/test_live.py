# SPDX-License-Identifier: MIT
"""A real Linux guest writes numbered, checksummed, synchronous blocks while its disk is copied.

Whatever it was told to be stable must be on the image that it runs on; and a finished copy must be
its disk at one instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase
from qmpmirror.testing.guest import (
    acknowledged,
    until_acknowledged,
)

if TYPE_CHECKING:
    from qmpmirror import Copy
    from tests.guest.live import Scene

SLOW = 256 * 1024  # bytes/s: keeps a copy in the copying phase


async def through_the_phases(scene: Scene, copy: Copy) -> None:
    """Let the guest write while the copy starts, copies, and mirrors."""
    await scene.more_writes()
    assert copy.phase is Phase.COPYING
    await copy.set_bandwidth(0)
    await copy.ready()
    await scene.more_writes()
    assert not copy.job.life.concluded


WAYS = [
    pytest.param({"shallow": True}, id="shallow"),
    pytest.param({"shallow": False}, id="full"),
    pytest.param({"shallow": True, "synchronous_writes": True}, id="shallow-synchronous"),
    pytest.param({"shallow": False, "format": "raw"}, id="full-raw"),
    pytest.param({"shallow": True, "via": "drive-mirror"}, id="shallow-drive-mirror"),
]


@pytest.mark.parametrize("way", WAYS)
async def test_pivot_loses_nothing_that_the_guest_was_told_is_stable(
    scene: Scene, way: dict[str, Any]
) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, bandwidth=SLOW, **way)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.pivot()
        after = acknowledged(scene.serial)
        assert result.outcome is Phase.PIVOTED
        assert result.active == str(scene.copy)
    await scene.check_runs_on(scene.copy)
    await scene.check_instant(scene.top, before, after)


@pytest.mark.parametrize("way", WAYS)
async def test_finish_is_the_guests_disk_at_one_instant(scene: Scene, way: dict[str, Any]) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, bandwidth=SLOW, **way)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.finish()
        after = acknowledged(scene.serial)
        assert result.outcome is Phase.FINISHED
    await scene.check_instant(scene.copy, before, after)
    await scene.check_runs_on(scene.top)


async def test_abort_while_mirroring_leaves_a_consistent_copy(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        copy = await machine.blockcopy("vda", scene.copy, shallow=True, bandwidth=SLOW)
        await through_the_phases(scene, copy)
        before = acknowledged(scene.serial)
        result = await copy.abort()
        after = acknowledged(scene.serial)
        assert (result.outcome, result.consistent) == (Phase.ABORTED, True)
    await scene.check_instant(scene.copy, before, after)
    await scene.check_runs_on(scene.top)


async def test_abort_while_copying_leaves_no_trace(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        nodes = set((await machine.graph()).nodes)
        copy = await machine.blockcopy("vda", scene.copy, shallow=True, bandwidth=SLOW)
        await scene.more_writes()
        result = await copy.abort()
        assert (result.outcome, result.consistent) == (Phase.ABORTED, False)
        assert set((await machine.graph()).nodes) == nodes
    assert not scene.copy.exists()
    await scene.check_runs_on(scene.top)


async def test_pivot_again_and_again_under_load(scene: Scene) -> None:
    async with qmpmirror.connect(str(scene.vm.qmp)) as machine:
        for turn in range(5):
            destination = scene.folder / f"copy{turn}"
            copy = await machine.blockcopy("vda", destination, shallow=True)
            await copy.ready()
            await copy.pivot()
            await until_acknowledged(scene.serial, acknowledged(scene.serial) + 20)
    await scene.check_runs_on(scene.folder / "copy4")
