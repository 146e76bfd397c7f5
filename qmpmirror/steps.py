# SPDX-License-Identifier: MIT
"""The commands of a plan, each with its undo.

A plan is a list of steps that can be shown, checked against a schema, or run. A step registers its
undo before it is sent: a command whose reply never came may have run. Undoing what is not there
is therefore no error.
"""

from __future__ import annotations

import fcntl
import logging
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from qmpmirror import errors
from qmpmirror.job import Job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpmirror.monitor import Monitor
    from qmpmirror.undo import Undo

log = logging.getLogger("qmpmirror.steps")

_BUSY_MACHINE: Final = "accurate CPU usage"
"""QEMU times its own CPU for a LUKS passphrase, and gives up when the machine is too busy."""

_TRIES: Final = 5


@attrs.frozen
class Command:
    """A QMP command with its arguments."""

    name: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict)

    def as_qmp(self) -> dict[str, Any]:
        """As it goes over the wire."""
        if self.arguments:
            return {"execute": self.name, "arguments": dict(self.arguments)}
        return {"execute": self.name}


class Step(Protocol):
    """One step of a plan."""

    def commands(self) -> list[Command]:
        """What will be sent, in order."""

    async def run(self, monitor: Monitor, undo: Undo) -> None:
        """Do it, after registering on ``undo`` how to take it back."""


@attrs.frozen
class Execute:
    """A command that has done its work when QEMU replies.

    Attributes:
        command: what to send.
        reverse: what takes it back, if anything.
    """

    command: Command
    reverse: Command | None = None

    def commands(self) -> list[Command]:
        """What will be sent, in order."""
        return [self.command]

    async def run(self, monitor: Monitor, undo: Undo) -> None:
        """Send the command."""
        if self.reverse is not None:
            undo.command(monitor, self.reverse)
        await monitor.execute(self.command.name, self.command.arguments)


@attrs.frozen
class CreateImage:
    """``blockdev-create``: a job that ends by itself.

    It is left concluded: until it is dismissed (`dismissal`) its id tells a later process what was
    created.

    Attributes:
        job_id: the job's id.
        options: what to create (``BlockdevCreateOptions``).
        makes_file: the path of a file that is not there before, or an empty string.
    """

    job_id: str
    options: Mapping[str, Any]
    makes_file: str = ""

    def commands(self) -> list[Command]:
        """What will be sent, in order."""
        arguments = {"job-id": self.job_id, "options": dict(self.options)}
        return [Command("blockdev-create", arguments)]

    def dismissal(self) -> Execute:
        """The step that makes QEMU forget the job."""
        return Execute(Command("job-dismiss", {"id": self.job_id}))

    async def run(self, monitor: Monitor, undo: Undo) -> None:
        """Create it and wait for the end.

        Raises:
            CommandFailed: with the job's error as reason, if it failed.
        """
        if self.makes_file:
            undo.add(f"remove {self.makes_file}", _discard, self.makes_file)
        undo.add(f"cancel job {self.job_id}", cancel_job, monitor, self.job_id)
        (create,) = self.commands()
        error = ""
        for _ in range(_TRIES):
            error = await self._create(monitor, create)
            if _BUSY_MACHINE not in error:
                break
            await cancel_job(monitor, self.job_id)
        if error:
            raise errors.CommandFailed(create.name, create.arguments, error, "GenericError")

    async def _create(self, monitor: Monitor, create: Command) -> str:
        with Job(monitor, self.job_id) as job:
            await monitor.execute(create.name, create.arguments)
            await job.wait(lambda life: life.concluded)
            ended = await job.refresh()
        return ended.error if ended is not None else ""


@attrs.frozen
class ProveAbsent:
    """Make sure that a path names nothing in QEMU's own view of the files.

    ``blockdev-create`` would empty an existing file. Needed where QEMU may see other files than we.
    """

    path: str
    node: str

    def commands(self) -> list[Command]:
        """What will be sent, in order."""
        options = {
            "driver": "file",
            "node-name": self.node,
            "filename": self.path,
            "read-only": True,
        }
        return [Command("blockdev-add", options)]

    async def run(self, monitor: Monitor, undo: Undo) -> None:  # noqa: ARG002 - Step
        """Try to open it.

        Raises:
            DestinationExists: it can be opened, so it is there.
            DestinationError: QEMU cannot tell, with its reason.
        """
        (add,) = self.commands()
        try:
            await monitor.execute(add.name, add.arguments)
        except errors.CommandFailed as error:
            if os.strerror(2) in error.reason:
                return
            raise errors.DestinationError(error.reason, destination=self.path) from error
        await monitor.execute("blockdev-del", {"node-name": self.node})
        raise errors.DestinationExists(
            f"{self.path} exists already, as QEMU sees it", destination=self.path
        )


async def attempt(monitor: Monitor, command: Command) -> str:
    """Send a command whose refusal means that there was nothing to do; return the reason."""
    try:
        await monitor.execute(command.name, command.arguments)
    except errors.CommandFailed as error:
        log.debug("%s: %s", command.name, error.reason)
        return error.reason
    return ""


async def cancel_job(monitor: Monitor, job_id: str) -> None:
    """Take a job away by force, wait until it has ended, and dismiss it; fine if it is gone."""
    with Job(monitor, job_id) as job:
        if await job.refresh() is None:
            return
        if not job.life.concluded:
            await attempt(monitor, Command("job-cancel", {"id": job_id}))
            await job.wait(lambda life: life.concluded)
        await job.dismiss()


def remove_file(path: str) -> bool:
    """Remove a file that this run created; False if it is gone, or was never ours.

    Another client may have been faster to create an image at the same path: one that is in use is
    not removed.
    """
    if _is_in_use(path):
        log.info("%s is in use and is not removed", path)
        return False
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError:
        # A read-only file system says so even of a file that is not there.
        if os.path.lexists(path):
            raise
        return False
    return True


def _is_in_use(path: str) -> bool:
    """Whether a process has locks on a file, as QEMU has on every image that it uses."""
    try:
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def _discard(path: str) -> None:
    remove_file(path)
