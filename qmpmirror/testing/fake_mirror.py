# SPDX-License-Identifier: MIT
"""Mirror jobs on a `FakeMonitor`: QEMU's states, events and refusals, at the test's own pace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror.testing.script import FakeError, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpmirror.testing.fake import FakeMonitor

_ACTIVE = frozenset({"created", "running", "paused", "ready", "standby"})
_VERBS = {
    "cancel": _ACTIVE | {"waiting", "pending"},
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "change": _ACTIVE,
    "complete": frozenset({"ready", "standby"}),
    "finalize": frozenset({"pending"}),
    "dismiss": frozenset({"concluded"}),
}
_PAUSED = {"running": "paused", "ready": "standby"}
_RESUMED = {"paused": "running", "standby": "ready"}


@attrs.define
class FakeJob:
    """A mirror job as QEMU keeps it. Length and offset are in bytes."""

    id: str
    device: str
    target: str
    filter: str
    length: int
    offset: int = 0
    speed: int = 0
    status: str = "undefined"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    copy_mode: str = "background"
    synced: bool = False
    replaces: str | None = None
    io_status: str = "ok"
    error: str | None = None
    user_paused: bool = False
    ending: str | None = None

    @property
    def active(self) -> bool:
        """Whether its filter still is on the source."""
        return self.status not in {"concluded", "null"}

    @property
    def ready(self) -> bool:
        """Whether it is in the mirroring phase."""
        return self.status in {"ready", "standby"}


@attrs.define(eq=False)
class FakeMirror:
    """Answers ``blockdev-mirror`` and all job commands of a `FakeMonitor`.

    ::

        mirror = FakeMirror(fake, auto_ready=False)
        ...  # the code under test starts a copy
        mirror.progress("job", offset=1 << 20)
        mirror.ready("job")

    Only what the test decides about is done by its methods: reaching ready, failing, an error on
    the way, the end. The commands do the rest, in QEMU's order: ``created`` and ``running`` before
    the reply, all else after it.

    Attributes:
        monitor: The server.
        length: What the jobs have to copy, in bytes.
        auto_ready: Whether a job is ready as soon as its start has been replied to.
        auto_end: Whether a job that was told to complete, or to cancel in ready, ends at once. If
            not it goes on being ready, as under a writing guest, until `end`.
        crash_on_second_complete: Whether the second ``complete`` of a job with ``replaces`` kills
            QEMU, as up to 10.0.9.
        jobs: The jobs that are not dismissed.
        pivoted: For each source whose disk now is on a target, that target.
    """

    monitor: FakeMonitor
    length: int = 64 * 1024 * 1024
    auto_ready: bool = True
    auto_end: bool = True
    crash_on_second_complete: bool = False
    jobs: dict[str, FakeJob] = attrs.field(init=False, factory=dict)
    pivoted: dict[str, str] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        on = self.monitor.on
        on("blockdev-mirror", self._start)
        on("query-jobs", lambda _: [self._job_info(job) for job in self.jobs.values()])
        on("query-block-jobs", lambda _: [self._block_job_info(job) for job in self.jobs.values()])
        on("block-job-set-speed", self._set_speed)
        on("block-job-change", self._change)
        on("block-job-cancel", self._block_job_cancel)
        on("job-cancel", lambda arguments: self._cancel(self._job(arguments, "cancel"), force=True))
        for verb, act in (
            ("pause", self._pause),
            ("resume", self._resume),
            ("complete", self._complete),
            ("finalize", self._finalize),
            ("dismiss", self._dismiss),
        ):
            on(f"job-{verb}", self._command(verb, act))
            on(f"block-job-{verb}", self._command(verb, act))

    # -- what the test decides -------------------------------------------------------------------

    def progress(self, job_id: str, offset: int, length: int | None = None) -> None:
        """Set how far a job has come, in bytes; there is no event for that."""
        job = self.jobs[job_id]
        job.offset = offset
        job.length = job.length if length is None else length

    def ready(self, job_id: str) -> None:
        """Let a job reach the mirroring phase."""
        job = self.jobs[job_id]
        job.offset = job.length
        job.synced = job.copy_mode == "write-blocking"
        self._change_status(job, "ready")
        self._block_job_event(job, "BLOCK_JOB_READY")

    def blip(self, job_id: str) -> None:
        """Let a job pause for a moment and go on, as it does whenever QEMU drains a node."""
        job = self.jobs[job_id]
        before = job.status
        self._change_status(job, _PAUSED[before])
        self._change_status(job, before)

    def io_error(self, job_id: str, operation: str = "write", action: str = "report") -> None:
        """Let a job meet an I/O error; with the action ``stop`` it pauses itself."""
        job = self.jobs[job_id]
        self.monitor.send_event(
            "BLOCK_JOB_ERROR", device=job.id, operation=operation, action=action
        )
        if action == "stop":
            job.io_status = "failed"
            job.user_paused = True
            self._change_status(job, _PAUSED[job.status])

    def fail(self, job_id: str, error: str = "Input/output error") -> None:
        """Let a job fail."""
        job = self.jobs[job_id]
        job.error = error
        self._change_status(job, "aborting")
        self._conclude(job, "BLOCK_JOB_COMPLETED")

    def end(self, job_id: str) -> None:
        """Let a job that was told to end do so, up to the point where it must be finalized."""
        job = self.jobs[job_id]
        self._change_status(job, "waiting")
        self._change_status(job, "pending")
        if job.auto_finalize:
            self._finalize(job)
        else:
            self.monitor.send_event("BLOCK_JOB_PENDING", type="mirror", id=job.id)

    # -- commands --------------------------------------------------------------------------------

    def _start(self, arguments: Message) -> Message:
        job_id = arguments.get("job-id") or arguments["device"]
        if any(arguments["device"] == job.device for job in self.jobs.values() if job.active):
            raise FakeError("Need a root block node")
        if job_id in self.jobs:
            raise FakeError(f"Job ID '{job_id}' already in use")
        job = FakeJob(
            id=job_id,
            device=arguments["device"],
            target=arguments["target"],
            filter=arguments.get("filter-node-name", "#block999"),
            length=self.length,
            speed=arguments.get("speed", 0),
            auto_finalize=arguments.get("auto-finalize", True),
            auto_dismiss=arguments.get("auto-dismiss", True),
            copy_mode=arguments.get("copy-mode", "background"),
            replaces=arguments.get("replaces"),
        )
        self.jobs[job_id] = job
        self._change_status(job, "created")
        self._change_status(job, "running")
        if self.auto_ready:
            self.monitor.after_reply(lambda: self.ready(job_id))
        return {}

    def _command(self, verb: str, act: Callable[[FakeJob], object]) -> Callable[[Message], Message]:
        def reply(arguments: Message) -> Message:
            act(self._job(arguments, verb))
            return {}

        return reply

    def _job(self, arguments: Message, verb: str) -> FakeJob:
        """The job that a command means, if it accepts the command now."""
        job = self.jobs.get(arguments.get("id") or arguments.get("device", ""))
        if job is None and "device" in arguments:
            raise FakeError(f"Block job '{arguments['device']}' not found", "DeviceNotActive")
        if job is None:
            raise FakeError("Job not found")
        early = (
            verb == "complete" and job.status == "standby" and not self.monitor.is_at_least(6, 1)
        )
        if early or job.status not in _VERBS[verb]:
            raise FakeError(
                f"Job '{job.id}' in state '{job.status}' cannot accept command verb '{verb}'"
            )
        return job

    def _set_speed(self, arguments: Message) -> Message:
        self._job(arguments, "set-speed").speed = arguments["speed"]
        return {}

    def _change(self, arguments: Message) -> Message:
        job = self._job(arguments, "change")
        if arguments["copy-mode"] == "background" != job.copy_mode:
            raise FakeError("Change to copy mode 'background' is not implemented")
        job.copy_mode = arguments["copy-mode"]
        return {}

    def _pause(self, job: FakeJob) -> None:
        if job.user_paused:
            raise FakeError("Job is already paused")
        job.user_paused = True
        self._change_status(job, _PAUSED[job.status])

    def _resume(self, job: FakeJob) -> None:
        if not job.user_paused:
            raise FakeError("Can't resume a job that was not paused")
        job.user_paused = False
        job.io_status = "ok"
        self._change_status(job, _RESUMED[job.status])
        if job.ending and self.auto_end:
            self.monitor.after_reply(lambda: self.end(job.id))

    def _complete(self, job: FakeJob) -> None:
        if job.ending == "pivot" and job.replaces and self.crash_on_second_complete:
            self.monitor.crash()
            return
        self._begin_ending(job, "pivot")

    def _block_job_cancel(self, arguments: Message) -> Message:
        job = self._job(arguments, "cancel")
        force = arguments.get("force", False)
        if job.user_paused and not force:
            raise FakeError(f"The block job for device '{job.id}' is currently paused")
        return self._cancel(job, force=force)

    def _cancel(self, job: FakeJob, *, force: bool) -> Message:
        if job.ready and not force:
            self._begin_ending(job, "finish")
        else:
            self.monitor.after_reply(lambda: self._abort(job))
        return {}

    def _begin_ending(self, job: FakeJob, ending: str) -> None:
        job.ending = ending
        if self.auto_end and not job.user_paused:
            self.monitor.after_reply(lambda: self.end(job.id))

    def _abort(self, job: FakeJob) -> None:
        job.error = "Operation canceled"
        self._change_status(job, "aborting")
        self._conclude(job, "BLOCK_JOB_CANCELLED")

    def _finalize(self, job: FakeJob) -> None:
        if job.ending == "pivot":
            self.pivoted[job.replaces or job.device] = job.target
        self._conclude(job, "BLOCK_JOB_COMPLETED")

    def _conclude(self, job: FakeJob, name: str) -> None:
        job.user_paused = False
        cancelled = name == "BLOCK_JOB_CANCELLED"
        self._block_job_event(job, name, error=None if cancelled else job.error)
        self._change_status(job, "concluded")
        if job.auto_dismiss:
            self._dismiss(job)

    def _dismiss(self, job: FakeJob) -> None:
        del self.jobs[job.id]
        self._change_status(job, "null")

    # -- what QEMU says --------------------------------------------------------------------------

    def _change_status(self, job: FakeJob, status: str) -> None:
        job.status = status
        self.monitor.send_event("JOB_STATUS_CHANGE", status=status, id=job.id)

    def _block_job_event(self, job: FakeJob, name: str, *, error: str | None = None) -> None:
        data = {
            "device": job.id,
            "len": job.length,
            "offset": job.offset,
            "speed": job.speed,
            "type": "mirror",
        }
        self.monitor.send_event(name, data | ({"error": error} if error else {}))

    @staticmethod
    def _job_info(job: FakeJob) -> Message:
        info = {
            "id": job.id,
            "type": "mirror",
            "status": job.status,
            "current-progress": job.offset,
            "total-progress": job.length,
        }
        return info | ({"error": job.error} if job.error else {})

    def _block_job_info(self, job: FakeJob) -> Message:
        info = {
            "type": "mirror",
            "device": job.id,
            "len": job.length,
            "offset": job.offset,
            "speed": job.speed,
            "status": job.status,
            "busy": False,
            "paused": job.user_paused or job.status == "pending",
            "ready": job.ready,
            "io-status": job.io_status,
            "auto-finalize": job.auto_finalize,
            "auto-dismiss": job.auto_dismiss,
        }
        if self.monitor.is_at_least(8, 2):
            info["actively-synced"] = job.synced
            # After a change of the mode it takes the job until its next round to notice.
            job.synced = job.ready and job.copy_mode == "write-blocking"
        return info | ({"error": job.error} if job.error else {})
