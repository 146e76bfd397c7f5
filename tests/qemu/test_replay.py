# SPDX-License-Identifier: MIT
"""What a real QEMU has said, said again by a fake monitor."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror.testing import replay
from tests.qemu.program import BLOCKDEV

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import FakeMonitor
    from tests.qemu.conftest import Boot, Connect, Layers

SPEED = 5.0


@pytest.fixture
async def recorded(boot: Boot, layers: Layers, connect: Connect) -> Path:
    """The transcript of a shallow copy and its pivot."""
    path = layers.folder / "transcript"
    vm = boot(*(word.format(layers.snap2) for word in BLOCKDEV))
    async with connect(vm, transcript=path) as machine:
        await scene(machine, layers)
    vm.stop()
    (layers.folder / "copy.qcow2").unlink()
    return path


async def scene(machine: qmpmirror.Machine, layers: Layers) -> qmpmirror.Result:
    copy = await machine.blockcopy("vda", layers.folder / "copy.qcow2", shallow=True)
    assert await copy.ready()
    return await copy.pivot()


async def test_the_same_comes_out(
    recorded: Path, layers: Layers, fake_monitor: Callable[..., FakeMonitor]
) -> None:
    async with fake_monitor() as fake:
        made = replay(fake, recorded, speed=SPEED)
        async with qmpmirror.connect(str(fake.path)) as machine:
            result = await scene(machine, layers)
    assert made.divergence == ""
    assert made.done
    assert result.outcome is qmpmirror.Phase.PIVOTED
    assert result.active == str(layers.folder / "copy.qcow2")


async def test_with_every_event_twice(
    recorded: Path, layers: Layers, fake_monitor: Callable[..., FakeMonitor]
) -> None:
    async with fake_monitor(duplicate_event=True) as fake:
        replay(fake, recorded, speed=SPEED)
        async with qmpmirror.connect(str(fake.path)) as machine:
            assert (await scene(machine, layers)).outcome is qmpmirror.Phase.PIVOTED


@pytest.mark.parametrize("fault", [{"corrupt": True}, {"half": True}, {"close": True}])
async def test_with_a_reply_that_breaks_the_connection(
    recorded: Path,
    layers: Layers,
    fake_monitor: Callable[..., FakeMonitor],
    fault: dict[str, Any],
) -> None:
    async with fake_monitor() as fake:
        replay(fake, recorded, speed=SPEED)
        fake.fault("job-complete", **fault)
        async with qmpmirror.connect(str(fake.path)) as machine:
            with pytest.raises(qmpmirror.ConnectionLost):
                await scene(machine, layers)


async def test_another_client_than_the_recorded_one(
    recorded: Path, layers: Layers, fake_monitor: Callable[..., FakeMonitor]
) -> None:
    async with fake_monitor() as fake:
        made = replay(fake, recorded, speed=SPEED)
        async with qmpmirror.connect(str(fake.path)) as machine:
            with pytest.raises(qmpmirror.Error, match="replay: "):
                await machine.blockcopy("vda", layers.folder / "copy.raw", format="raw")
            assert "was recorded" in made.divergence or "not in the transcript" in made.divergence


async def test_a_reply_that_comes_twice(fake_monitor: Callable[..., FakeMonitor]) -> None:
    async with fake_monitor() as fake:
        fake.fault("query-jobs", duplicate=True)
        reader, writer = await asyncio.open_unix_connection(fake.path)
        await reader.readline()
        for command in ("qmp_capabilities", "query-jobs"):
            writer.write(f'{{"execute": "{command}"}}'.encode())
        lines = [await reader.readline() for _ in range(3)]
        writer.close()
    assert lines[1] == lines[2] == b'{"return": []}\r\n'
