# SPDX-License-Identifier: MIT
"""The fake mirror does what the real one does: same commands, same replies, same events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from qmpmirror.testing.fake_mirror import FakeMirror

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import ImageTools, Qemu
    from qmpmirror.testing.fake import FakeMonitor
    from qmpmirror.testing.plugin import QemuFactory

SIZE = 1024 * 1024

# What is done, command by command; a status in capitals is waited for.
SCENARIOS: dict[str, list[str]] = {
    "pivot": [
        "start",
        "READY",
        "queries",
        "complete",
        "CONCLUDED",
        "queries",
        "dismiss",
        "queries",
    ],
    "pivot-by-block-job": ["start", "READY", "block-complete", "CONCLUDED", "block-dismiss"],
    "two-phases": [
        *("start-by-hand", "READY", "complete", "PENDING", "queries", "complete", "pause"),
        *("finalize", "CONCLUDED", "queries", "dismiss"),
    ],
    "roll-back": [
        "start-by-hand",
        "READY",
        "complete",
        "PENDING",
        "cancel",
        "CONCLUDED",
        "queries",
    ],
    "roll-back-by-job": [
        "start-by-hand",
        "READY",
        "complete",
        "PENDING",
        "job-cancel",
        "CONCLUDED",
    ],
    "finish": ["start", "READY", "cancel", "CONCLUDED", "queries", "dismiss"],
    "abort": ["start", "READY", "force-cancel", "CONCLUDED", "queries", "dismiss"],
    "abort-by-job": ["start", "READY", "job-cancel", "CONCLUDED", "queries", "dismiss"],
    "abort-early": ["start-slow", "cancel", "CONCLUDED", "queries", "dismiss"],
    "auto-dismiss": ["start-dismissing", "READY", "complete", "NULL", "queries"],
    "pause-in-ready": [
        "start",
        "READY",
        "pause",
        "STANDBY",
        "pause",
        "queries",
        "cancel",
        "resume",
    ],
    "refusals": [
        *("complete", "block-complete", "cancel", "dismiss", "pause", "start-slow", "start-slow"),
        *("complete", "finalize", "dismiss", "resume", "queries", "speed"),
    ],
}
NEWER = {
    "change": ["start", "READY", "no-change", "queries", "change", "change-back", "queries"],
    "write-blocking": ["start-blocking", "READY", "queries", "complete", "CONCLUDED"],
    "change-early": ["start-slow", "change", "change-back", "queries"],
}
START = {"job-id": "j", "device": "src", "target": "tgt", "sync": "full", "auto-dismiss": False}
CHANGE = {"id": "j", "type": "mirror"}
BLOCK_JOB_EVENTS = [
    f"BLOCK_JOB_{name}" for name in ("READY", "PENDING", "COMPLETED", "CANCELLED", "ERROR")
]
COMMANDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "queries": [("query-jobs", {}), ("query-block-jobs", {})],
    "start": [("blockdev-mirror", START)],
    "start-by-hand": [("blockdev-mirror", {**START, "auto-finalize": False})],
    "start-slow": [("blockdev-mirror", {**START, "speed": 1, "buf-size": 65536})],
    "start-blocking": [("blockdev-mirror", {**START, "copy-mode": "write-blocking"})],
    "start-dismissing": [("blockdev-mirror", {**START, "auto-dismiss": True})],
    "complete": [("job-complete", {"id": "j"})],
    "block-complete": [("block-job-complete", {"device": "j"})],
    "finalize": [("job-finalize", {"id": "j"})],
    "dismiss": [("job-dismiss", {"id": "j"})],
    "block-dismiss": [("block-job-dismiss", {"id": "j"})],
    "pause": [("job-pause", {"id": "j"})],
    "resume": [("job-resume", {"id": "j"})],
    "cancel": [("block-job-cancel", {"device": "j"})],
    "force-cancel": [("block-job-cancel", {"device": "j", "force": True})],
    "job-cancel": [("job-cancel", {"id": "j"})],
    "speed": [("block-job-set-speed", {"device": "j", "speed": 7})],
    "change": [("block-job-change", {**CHANGE, "copy-mode": "write-blocking"})],
    "no-change": [("block-job-change", {**CHANGE, "copy-mode": "background"})],
    "change-back": [("block-job-change", {**CHANGE, "copy-mode": "background"})],
}


async def play(path: Path, scenario: list[str]) -> list[Any]:
    """The replies of a scenario and, apart from them, its events."""
    client, listener = QMPClient(), EventListener(("JOB_STATUS_CHANGE", *BLOCK_JOB_EVENTS))
    replies: list[Any] = []
    events: list[dict[str, Any]] = []
    await client.connect(str(path))
    try:
        with client.listen(listener):
            for step in scenario:
                if step.isupper():
                    await until(listener, events, step.lower())
                else:
                    replies += [await reply(client, *command) for command in COMMANDS[step]]
    finally:
        await client.disconnect()
    return [replies, events]


async def until(listener: EventListener, events: list[dict[str, Any]], status: str) -> None:
    while not events or events[-1].get("status") != status:
        message: Any = await asyncio.wait_for(listener.get(), 20)
        events.append({"event": message["event"], **message["data"]})


async def reply(client: QMPClient, command: str, arguments: dict[str, Any]) -> Any:
    try:
        return await client.execute(command, arguments)
    except ExecuteError as error:
        return (command, error.error_class, str(error))


@pytest.fixture
def real(qemu: QemuFactory, images: ImageTools, tmp_path: Path) -> Qemu:
    """A QEMU with a source full of data: what is known to be zero, new QEMUs do not copy."""
    vm = qemu()
    vm.start()
    for name in ("src", "tgt"):
        path = images.create(tmp_path / f"{name}.raw", SIZE, "raw")
        images.write_pattern(path, 0, SIZE, 0x11, "raw")
        file = {"driver": "file", "filename": str(path)}
        vm.execute("blockdev-add", driver="raw", node_name=name, file=file)
    return vm


# What a real job says after such a step depends on how far it has come meanwhile.
CHANCE = {"start-slow": {"offset", "current-progress"}, "change": {"actively-synced"}}


def without(keys: set[str], played: Any) -> Any:
    if isinstance(played, list):
        return [without(keys, part) for part in played]
    if isinstance(played, dict):
        return {key: value for key, value in played.items() if key not in keys}
    return played


async def compare(
    real: Qemu, fake_monitor: Callable[..., FakeMonitor], scenario: list[str]
) -> None:
    chance = {"busy"}.union(*(CHANCE.get(step, set()) for step in scenario))
    async with fake_monitor(version=real.version) as fake:
        FakeMirror(fake, length=SIZE, auto_ready="start-slow" not in scenario)
        faked = without(chance, await play(fake.path, scenario))
    assert faked == without(chance, await play(real.qmp, scenario))


@pytest.mark.parametrize("name", SCENARIOS)
async def test_likeness(real: Qemu, fake_monitor: Callable[..., FakeMonitor], name: str) -> None:
    await compare(real, fake_monitor, SCENARIOS[name])


@pytest.mark.qemu(">= 8.2")
@pytest.mark.parametrize("name", NEWER)
async def test_likeness_of_a_changed_copy_mode(
    real: Qemu, fake_monitor: Callable[..., FakeMonitor], name: str
) -> None:
    await compare(real, fake_monitor, NEWER[name])
