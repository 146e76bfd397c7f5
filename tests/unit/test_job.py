# SPDX-License-Identifier: MIT
"""The driver of a job's life, where a real QEMU cannot be made to show what is at stake."""

from __future__ import annotations

from typing import Any

import pytest

from qmpmirror import errors
from qmpmirror.job import Job
from qmpmirror.life import Life
from qmpmirror.monitor import Event
from qmpmirror.steps import CreateImage
from qmpmirror.undo import Undo


class OvertakenMonitor:
    """A connection on which events are handled before a reply that came before them."""

    loss = None

    def __init__(self, *statuses: str) -> None:
        self.statuses = statuses
        self.listeners: list[Any] = []

    def subscribe(self, listener: Any) -> Any:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    async def execute(self, command: str) -> list[dict[str, Any]]:
        assert command == "query-jobs"
        for status in self.statuses:
            for listener in self.listeners:
                listener(Event("JOB_STATUS_CHANGE", {"id": "job0", "status": status}, 0.0))
        progress = {"current-progress": 1, "total-progress": 1}
        return [{"id": "job0", "type": "mirror", "status": "ready", **progress}]


async def test_an_old_reply_does_not_take_a_job_back() -> None:
    monitor: Any = OvertakenMonitor("aborting", "concluded")
    with Job(monitor, "job0", Life.resume("ready")) as job:
        await job.refresh()
        assert job.life.concluded
        assert job.life.aborting


async def test_a_reply_without_events_is_believed() -> None:
    monitor: Any = OvertakenMonitor()
    with Job(monitor, "job0", Life.resume("running")) as job:
        await job.refresh()
        assert job.life.mirrored


async def test_an_event_before_the_first_look_is_no_surprise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor: Any = OvertakenMonitor("aborting", "concluded")
    with Job(monitor, "job0") as job:
        await job.refresh()
        assert job.life.concluded
        assert job.life.aborting
    assert caplog.messages == []


class BusyMonitor(OvertakenMonitor):
    """A QEMU that gives up to create a LUKS image, because its machine is busy."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.created = 0
        self.known = False

    async def execute(self, command: str, arguments: Any = None) -> Any:
        del arguments
        if command == "blockdev-create":
            self.created, self.known = self.created + 1, True
        if command == "job-dismiss":
            self.known = False
        error = "Unable to get accurate CPU usage" if self.created <= self.failures else ""
        progress = {"current-progress": 1, "total-progress": 1}
        job = {"id": "job0", "type": "create", "status": "concluded", "error": error, **progress}
        return [job] if command == "query-jobs" and self.known else []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This monitor sends no events: all is found out by looking."""
    monkeypatch.setattr("qmpmirror.job._CHECK_SECONDS", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_a_busy_machine_is_asked_again_for_an_encrypted_image() -> None:
    monitor: Any = BusyMonitor(failures=3)
    await CreateImage("job0", {"driver": "luks"}).run(monitor, Undo())
    assert monitor.created == 4


@pytest.mark.usefixtures("impatient")
async def test_but_not_for_ever() -> None:
    monitor: Any = BusyMonitor(failures=99)
    with pytest.raises(errors.CommandFailed, match="accurate CPU usage"):
        await CreateImage("job0", {"driver": "luks"}).run(monitor, Undo())
    assert monitor.created == 5
