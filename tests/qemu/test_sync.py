# SPDX-License-Identifier: MIT
"""The blocking face on a real QEMU."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import sync
from tests.qemu.program import BLOCKDEV

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Guest, Layers


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot(*(word.format(layers.snap2) for word in BLOCKDEV))


def test_the_whole_scene(vm: Qemu, layers: Layers, guest: Callable[..., Guest]) -> None:
    writer = guest(vm)
    destination = layers.folder / "copy.qcow2"
    with sync.connect(str(vm.qmp)) as machine:
        (disk,) = machine.disks()
        assert disk.path == str(layers.snap2)
        copy = machine.blockcopy("vda", destination, shallow=True)
        assert isinstance(copy, sync.Copy)
        for progress in copy.progress(0.05):
            assert progress.phase in {qmpmirror.Phase.COPYING, qmpmirror.Phase.MIRRORING}
        assert copy.ready()
        writer.scribble()
        assert copy.phase is qmpmirror.Phase.MIRRORING
        result = copy.pivot()
        assert result.outcome is qmpmirror.Phase.PIVOTED
        assert result.active == str(destination)
        with pytest.raises(qmpmirror.EndingAlreadyAsked):
            copy.finish()
        writer.check()
        assert machine.jobs() == []
    assert "qmpmirror-sync" not in {thread.name for thread in threading.enumerate()}
    assert layers.chain(destination)[1:] == [str(layers.snap1), str(layers.base)]


def test_another_connection_takes_the_copy_up(
    vm: Qemu, layers: Layers, pinned: dict[str, Any]
) -> None:
    destination = layers.folder / "copy.qcow2"
    with sync.connect(str(vm.qmp)) as machine:
        first = machine.blockcopy("vda", destination, **pinned)
    with sync.connect(str(vm.qmp)) as machine:
        again = machine.blockjob("vda")
        assert isinstance(again, sync.Copy)
        assert again.id == first.id
        again.set_bandwidth(0)
        assert again.ready()
        assert again.finish().outcome is qmpmirror.Phase.FINISHED
        assert machine.blockjob("vda") is None


def test_copies_of_a_group_block_as_well(vm: Qemu, layers: Layers) -> None:
    with sync.connect(str(vm.qmp)) as machine:
        members = [qmpmirror.Member("vda", str(layers.folder / "copy.qcow2"))]
        group = machine.blockcopy_group(members)
        assert [type(copy) for copy in group.copies] == [sync.Copy]
        assert group.ready()
        assert group.finish().outcome is qmpmirror.Phase.FINISHED


def test_leaving_a_progress_loop_touches_nothing(
    vm: Qemu, layers: Layers, pinned: dict[str, Any]
) -> None:
    with sync.connect(str(vm.qmp)) as machine:
        copy = machine.blockcopy("vda", layers.folder / "copy.qcow2", **pinned)
        for _ in copy.progress(0.05):
            break
        assert [job.id for job in machine.jobs()] == [copy.id]
        assert copy.abort().outcome is qmpmirror.Phase.ABORTED


async def test_a_notebook_has_a_running_loop(vm: Qemu) -> None:
    with sync.connect(str(vm.qmp)) as machine:
        assert [disk.name for disk in machine.disks()] == ["vda"]


def test_several_threads_share_a_connection(vm: Qemu) -> None:
    found: list[str] = []
    with sync.connect(str(vm.qmp)) as machine:
        callers = [
            threading.Thread(target=lambda: found.append(machine.disk("vda").name))
            for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    assert found == ["vda"] * 4
