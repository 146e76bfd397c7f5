# SPDX-License-Identifier: MIT
"""The driver of a job's life, where a real QEMU cannot be made to show what is at stake."""

from __future__ import annotations

from typing import Any

from qmpmirror.job import Job
from qmpmirror.life import Life
from qmpmirror.monitor import Event


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
