# SPDX-License-Identifier: MIT
"""How the copies of a group have ended, and when its disks stood still for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qmpmirror import errors
from qmpmirror.life import Phase
from qmpmirror.operations.conclusion import Result

if TYPE_CHECKING:
    from qmpmirror.operations.copy import Copy


@attrs.frozen
class Cut:
    """When a disk stood still.

    Attributes:
        disk: its name.
        pending: from when on its writes waited, by QEMU's clock, in seconds since the epoch.
        finalized: when they went on.
    """

    disk: str
    pending: float
    finalized: float

    @property
    def freeze(self) -> float:
        """How long its writes waited, in seconds."""
        return max(0.0, self.finalized - self.pending)


@attrs.frozen
class GroupResult:
    """How a group has ended.

    Attributes:
        results: of each disk, in the group's order. That of a copy that failed has the outcome
            ``FAILED``, and the reason as its note.
        cuts: of each disk whose copy is good.
        left: what could not be put right again, other than by the copies themselves: the guest's
            file systems, say, that could not be thawed.
    """

    results: tuple[Result, ...]
    cuts: tuple[Cut, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def outcome(self) -> Phase:
        """What became of all of them; ``FAILED`` when they differ."""
        outcomes = {result.outcome for result in self.results}
        return outcomes.pop() if len(outcomes) == 1 else Phase.FAILED

    @property
    def longest_freeze(self) -> float:
        """Seconds from the first write that waited to the last that went on."""
        if not self.cuts:
            return 0.0
        return max(c.finalized for c in self.cuts) - min(c.pending for c in self.cuts)

    @property
    def left_over(self) -> tuple[str, ...]:
        """What could not be cleaned up, of all disks."""
        return (*(entry for each in self.results for entry in each.left), *self.left)


def failed_result(copy: Copy, failure: errors.JobFailed) -> Result:
    """A copy that failed, as a result among others."""
    return Result(
        outcome=Phase.FAILED,
        disk=copy.disk.name,
        source=copy.disk.path,
        destination=copy.destination,
        active=failure.authoritative,
        consistent=False,
        left=failure.left,
        notes=(failure.reason,),
    )


def failure_of(copy: Copy, reason: str, result: GroupResult | None = None) -> errors.JobFailed:
    """What is raised when one copy fails before the cut."""
    failure = errors.JobFailed(
        f"the copy of {copy.disk.name} failed: {reason}; all copies were rolled back",
        job_id=copy.id,
        reason=reason,
        authoritative=copy.disk.path,
    )
    failure.left = result.left_over if result else ()
    return failure
