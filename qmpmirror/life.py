# SPDX-License-Identifier: MIT
"""The life of a mirror job as a pure state machine: no I/O, no clock.

    copying → mirroring → pivoting | finishing | aborting → pivoted | finished | aborted | failed

It takes QEMU's job statuses and our own requests, and refuses what cannot happen.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

CANCELLED: Final = "Operation canceled"
"""QEMU's words for a job that was cancelled by force."""

# QEMU's own table (job.c, JobSTT): which status may follow which.
_FOLLOWERS: Final[Mapping[str, frozenset[str]]] = {
    "undefined": frozenset({"created"}),
    "created": frozenset({"running", "aborting", "null"}),
    "running": frozenset({"paused", "ready", "waiting", "aborting"}),
    "paused": frozenset({"running"}),
    "ready": frozenset({"standby", "waiting", "aborting"}),
    "standby": frozenset({"ready"}),
    "waiting": frozenset({"pending", "aborting"}),
    "pending": frozenset({"aborting", "concluded"}),
    "aborting": frozenset({"concluded"}),
    "concluded": frozenset({"null"}),
    "null": frozenset(),
}
_AFTER_READY: Final = frozenset({"ready", "standby"})
_LEAVING: Final = frozenset({"waiting", "pending", "aborting", "concluded", "null"})


class Ending(enum.Enum):
    """What a mirror can be asked to end in."""

    PIVOT = "pivot"
    FINISH = "finish"
    ABORT = "abort"


class Phase(enum.Enum):
    """Where a copy is in its life."""

    COPYING = "copying"
    MIRRORING = "mirroring"
    PIVOTING = "pivoting"
    FINISHING = "finishing"
    ABORTING = "aborting"
    PIVOTED = "pivoted"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"
    LOST = "lost"

    @property
    def over(self) -> bool:
        """Whether nothing can follow."""
        return self in _OVER


_OVER: Final = frozenset({Phase.PIVOTED, Phase.FINISHED, Phase.ABORTED, Phase.FAILED, Phase.LOST})
_ENDING_PHASES: Final[Mapping[Ending, Phase]] = {
    Ending.PIVOT: Phase.PIVOTING,
    Ending.FINISH: Phase.FINISHING,
    Ending.ABORT: Phase.ABORTING,
}


class Active(enum.Enum):
    """Which image the guest uses, read back from QEMU's graph."""

    SOURCE = "source"
    TARGET = "target"
    OTHER = "other"


class IllegalTransitionError(RuntimeError):
    """An event or a request that cannot follow what went before."""


@attrs.define
class Life:
    """The state machine of one mirror job.

    Attributes:
        phase: where the copy is.
        status: QEMU's last job status.
        asked: the ending that was asked for, if any.
        mirrored: whether the mirroring phase was reached: only then is a soft cancel consistent.
        aborting: whether QEMU was seen to give the job up. It has failed then, or was cancelled by
            force, even if somebody else has dismissed it and its error is lost.
        cancelled: whether QEMU said that the job was cancelled by force.
    """

    phase: Phase = Phase.COPYING
    status: str = "undefined"
    asked: Ending | None = None
    mirrored: bool = False
    aborting: bool = False
    cancelled: bool = False

    @classmethod
    def resume(cls, status: str, asked: Ending | None = None, *, mirrored: bool = False) -> Life:
        """The life of a job that was found at ``status``, its earlier events unseen."""
        life = cls(status=status, asked=asked)
        life.aborting = status == "aborting"
        life.mirrored = mirrored or status in _AFTER_READY | {"waiting", "pending"}
        if asked is not None:
            life.phase = _ENDING_PHASES[asked]
        elif life.mirrored:
            life.phase = Phase.MIRRORING
        return life

    @property
    def concluded(self) -> bool:
        """Whether QEMU has ended the job."""
        return self.status in {"concluded", "null"}

    def feed(self, status: str) -> Phase:
        """Take the status of a ``JOB_STATUS_CHANGE`` event.

        Only the first ``ready`` matters: a drain of any node makes ready → standby → ready blips,
        and running → paused → running ones. A repeated status changes nothing.

        Raises:
            IllegalTransitionError: QEMU cannot send this status now.
        """
        if status == self.status:
            return self.phase
        if status not in _FOLLOWERS.get(self.status, frozenset()) or self.phase.over:
            raise IllegalTransitionError(
                f"{status} cannot follow {self.status} ({self.phase.value})"
            )
        self.status = status
        self.aborting |= status == "aborting"
        if status == "ready":
            self.mirrored = True
            if self.phase is Phase.COPYING:
                self.phase = Phase.MIRRORING
        return self.phase

    def ask(self, ending: Ending, *, force: bool = False) -> None:
        """Note that an ending is about to be asked for.

        Args:
            ending: which one.
            force: with an abort, that it overrules an ending that was asked for before.

        Raises:
            IllegalTransitionError: an ending was asked for before, or it needs the mirroring phase.
        """
        overruled = force and ending is Ending.ABORT
        if self.phase.over or self.status in _LEAVING or (self.asked and not overruled):
            raise IllegalTransitionError(f"{ending.value} cannot follow {self.phase.value}")
        if ending is not Ending.ABORT and self.phase is not Phase.MIRRORING:
            raise IllegalTransitionError(f"{ending.value} needs the mirroring phase")
        self.asked = ending
        self.phase = _ENDING_PHASES[ending]

    def refused(self) -> None:
        """QEMU refused the ending: the job goes on as before."""
        if self.asked is None or self.phase.over:
            raise IllegalTransitionError("no ending is under way")
        self.asked = None
        self.phase = Phase.MIRRORING if self.mirrored else Phase.COPYING

    def conclude(self, error: str, active: Active) -> Phase:
        """Say what has really happened.

        A finish and a pivot give the same events, somebody else may have ended the job, and a
        failed job may have switched the guest: the graph decides, not what was meant.

        Args:
            error: the job's error from ``query-jobs``; empty when it has none.
            active: the image under the guest device, read from the graph after the end.

        Raises:
            IllegalTransitionError: QEMU has not ended the job.
        """
        if not self.concluded or self.phase.over:
            raise IllegalTransitionError(f"not concluded but {self.status} ({self.phase.value})")
        if active is Active.TARGET:
            self.phase = Phase.PIVOTED
        elif active is Active.OTHER:
            self.phase = Phase.FAILED
        elif self.cancelled or error == CANCELLED:
            self.cancelled = True
            self.phase = Phase.ABORTED
        elif error or self.aborting:
            self.phase = Phase.FAILED
        else:
            # Only in the mirroring phase does a cancel give no error.
            self.mirrored = True
            self.phase = Phase.ABORTED if self.asked is Ending.ABORT else Phase.FINISHED
        return self.phase

    def lose(self) -> None:
        """The connection is gone; the job may go on."""
        if not self.phase.over:
            self.phase = Phase.LOST
