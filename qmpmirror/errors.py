# SPDX-License-Identifier: MIT
"""Everything that can go wrong, in one tree.

::

    qmpmirror.Error
    ├── UsageError                 a value that can never work
    ├── ConnectError               no monitor could be had
    │   ├── NoSuchMonitor          no such socket, name or pid
    │   ├── NotListening           the socket is there, nobody is behind it
    │   ├── NotQMP                 somebody answers, but does not speak QMP
    │   ├── MonitorBusy            another client holds this monitor
    │   └── AmbiguousDomain        several QEMUs have this name
    ├── ConnectionLost             the monitor went away; the outcome is unknown
    ├── DeadlineExceeded           a deadline passed
    │   ├── CommandTimeout         QEMU did not answer a command
    │   └── Stalled                a job made no progress
    ├── Refused                    QEMU refused, or lacks what was asked; nothing changed
    │   ├── CommandFailed          QEMU's own error reply
    │   ├── Unsupported            this QEMU lacks a command or an argument
    │   ├── DiskError
    │   │   ├── DiskNotFound
    │   │   ├── AmbiguousDisk
    │   │   ├── EmptyDrive
    │   │   └── DiskBusy           the disk has a block job already
    │   └── DestinationError
    │       └── DestinationExists
    ├── MigrationFailed            the guest did not get to the destination
    └── JobError                   a block job did not do what was asked
        ├── NotReady               not in the mirroring phase yet
        ├── EndingAlreadyAsked     somebody asked for an ending before
        ├── JobNotFound
        └── JobFailed              the job ended with an error

An outcome that the caller asked for, such as an abort, is a result and no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Error(Exception):
    """Base of every error that qmpmirror raises on purpose.

    Attributes:
        description: one sentence that says what, which value, and what to do.
        hint: a second sentence with advice, or an empty string.
        left: what could not be undone or cleaned up, one entry each.
    """

    def __init__(self, description: str, *, hint: str = "") -> None:
        super().__init__(description)
        self.description = description
        self.hint = hint
        self.left: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.description} ({self.hint})" if self.hint else self.description


class UsageError(Error, ValueError):
    """A value that no QEMU could accept, such as a negative bandwidth."""


class ConnectError(Error):
    """No connection to a QMP monitor could be made.

    Attributes:
        address: what was tried.
    """

    def __init__(self, description: str, *, address: str = "", hint: str = "") -> None:
        super().__init__(description, hint=hint)
        self.address = address


class NoSuchMonitor(ConnectError):
    """There is no such socket, and no QEMU of that name or pid."""


class NotListening(ConnectError):
    """Nobody listens behind the address."""


class NotQMP(ConnectError):
    """What answered does not speak QMP."""


class MonitorBusy(ConnectError):
    """No greeting came: a QMP monitor serves one client at a time."""


class AmbiguousDomain(ConnectError):
    """Several running QEMUs answer to the name.

    Attributes:
        candidates: each of them, described.
    """

    def __init__(self, description: str, *, candidates: Sequence[str], address: str = "") -> None:
        super().__init__(description, address=address)
        self.candidates = tuple(candidates)


class ConnectionLost(Error):
    """The monitor connection ended.

    Attributes:
        command: the command whose reply never came, if one was under way. It may have run.
        job_id: the job that was being watched, if any. It may still run.
    """

    def __init__(
        self, description: str, *, command: str = "", job_id: str = "", hint: str = ""
    ) -> None:
        super().__init__(description, hint=hint)
        self.command = command
        self.job_id = job_id


class DeadlineExceeded(Error):
    """A deadline passed."""


class CommandTimeout(DeadlineExceeded):
    """QEMU did not answer a command in time; it may still carry the command out.

    Attributes:
        command: the command.
        seconds: how long was waited.
    """

    def __init__(self, command: str, seconds: float) -> None:
        super().__init__(
            f"QEMU did not answer {command} within {seconds:g} s",
            hint="its main loop may be blocked by hanging storage; the command may still run",
        )
        self.command = command
        self.seconds = seconds


class Stalled(DeadlineExceeded):
    """A job made no progress for too long. It has been left running.

    Attributes:
        job_id: the job.
    """

    def __init__(self, description: str, *, job_id: str, hint: str = "") -> None:
        super().__init__(description, hint=hint)
        self.job_id = job_id


class Refused(Error):
    """QEMU refused, or lacks what was asked. Nothing has changed."""


class CommandFailed(Refused):
    """QEMU answered a command with an error.

    Attributes:
        command: the command.
        arguments: its arguments.
        reason: QEMU's own words.
        error_class: QEMU's error class. It differs between versions: do not branch on it.
    """

    def __init__(
        self, command: str, arguments: Mapping[str, object], reason: str, error_class: str
    ) -> None:
        super().__init__(f"QEMU refused {command}: {reason}")
        self.command = command
        self.arguments = dict(arguments)
        self.reason = reason
        self.error_class = error_class


class Unsupported(Refused):
    """This QEMU lacks a command, an argument or a value.

    Attributes:
        command: the command concerned.
        argument: the argument concerned, with dots for members, or an empty string.
    """

    def __init__(
        self, description: str, *, command: str = "", argument: str = "", hint: str = ""
    ) -> None:
        super().__init__(description, hint=hint)
        self.command = command
        self.argument = argument


class DiskError(Refused):
    """Something about the source disk.

    Attributes:
        disk: what the user called it.
        candidates: the disks that there are, described.
    """

    def __init__(
        self, description: str, *, disk: str, candidates: Sequence[str] = (), hint: str = ""
    ) -> None:
        super().__init__(description, hint=hint)
        self.disk = disk
        self.candidates = tuple(candidates)


class DiskNotFound(DiskError):
    """No disk answers to the name."""


class AmbiguousDisk(DiskError):
    """Several disks answer to the name."""


class EmptyDrive(DiskError):
    """The drive has no medium."""


class DiskBusy(DiskError):
    """A block job runs on the disk already.

    Attributes:
        job_id: that job.
    """

    def __init__(self, description: str, *, disk: str, job_id: str, hint: str = "") -> None:
        super().__init__(description, disk=disk, hint=hint)
        self.job_id = job_id


class DestinationError(Refused):
    """The destination cannot be used.

    Attributes:
        destination: what the user gave.
    """

    def __init__(self, description: str, *, destination: str, hint: str = "") -> None:
        super().__init__(description, hint=hint)
        self.destination = destination


class DestinationExists(DestinationError):
    """The destination holds something already."""


class MigrationFailed(Error):
    """A migration did not come to its end.

    Attributes:
        reason: why, in QEMU's words where it has said something.
        runs_on: where the guest is now, read back from QEMU: ``source``; ``nowhere`` when no QEMU
            runs it, and the hint says what to do; ``unknown`` when that cannot be found out.
    """

    def __init__(self, description: str, *, reason: str, runs_on: str, hint: str = "") -> None:
        super().__init__(description, hint=hint)
        self.reason = reason
        self.runs_on = runs_on


class JobError(Error):
    """Something about a block job.

    Attributes:
        job_id: the job.
    """

    def __init__(self, description: str, *, job_id: str, hint: str = "") -> None:
        super().__init__(description, hint=hint)
        self.job_id = job_id


class NotReady(JobError):
    """The job is not in the mirroring phase, which is needed for what was asked."""


class EndingAlreadyAsked(JobError):
    """An ending was asked for before; QEMU carries out one only."""


class JobNotFound(JobError):
    """QEMU has no such job."""


class JobFailed(JobError):
    """The job ended with an error.

    Attributes:
        reason: QEMU's own words.
        authoritative: the image that the guest uses, read back from QEMU's graph.
        removed: the file that was removed, because it was not whole; empty when none was.
    """

    def __init__(
        self, description: str, *, job_id: str, reason: str, authoritative: str, removed: str = ""
    ) -> None:
        super().__init__(description, job_id=job_id)
        self.reason = reason
        self.authoritative = authoritative
        self.removed = removed
