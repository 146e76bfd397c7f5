# SPDX-License-Identifier: MIT
"""What `recover` finds, in words."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from qmpmirror.life import Ending, Phase
from qmpmirror.names import Flag

if TYPE_CHECKING:
    from qmpmirror.life import Life
    from qmpmirror.names import JobName
    from qmpmirror.operations.conclusion import Result


class Way(enum.Enum):
    """What to do with a job whose ending nobody has asked for yet."""

    LEAVE = "leave"
    FINISH = "finish"
    UNDO = "undo"


class State(enum.Enum):
    """How far an interrupted run had come."""

    CREATING = "creating the image"
    COPYING = "copying"
    MIRRORING = "mirroring"
    ENDING = "ending"
    ENDED = "ended"


@attrs.frozen
class Finding:
    """One interrupted run.

    Attributes:
        run: its id.
        what: ``copy``, ``commit``, ``pull``, ``snapshot`` or ``migration``.
        state: how far it had come.
        disk: the disk's name; empty when the run had not come so far.
        destination: where its data goes.
        active: the image that the guest uses; empty when no disk is known.
        action: what was done, or is going to be done.
        left: what could not be cleaned up, one entry each.
    """

    run: str
    what: str
    state: State
    disk: str
    destination: str
    active: str
    action: str
    left: tuple[str, ...] = ()


def state_of(life: Life) -> State:
    """How far a job has come."""
    if life.concluded:
        return State.ENDED
    if life.asked is not None or life.status == "pending":
        return State.ENDING
    return State.MIRRORING if life.mirrored else State.COPYING


def ending_of(name: JobName) -> Ending:
    """What a job of two phases was started for."""
    return Ending.PIVOT if Flag.THEN_PIVOT in name.flags else Ending.FINISH


def intention(name: JobName, asked: Ending | None, state: State, way: Way) -> str:
    """What would be done."""
    if state is State.ENDED:
        return "would be put away"
    if way is Way.UNDO:
        return "would be aborted"
    if state is State.ENDING and Flag.GROUP in name.flags:
        return "would be rolled back with its group, or finalized if that was cut"
    if state is State.ENDING:
        return f"would be seen through: {asked.value if asked else 'finish'}"
    return "would be left running" if way is Way.LEAVE else f"would {_finishing(name)}"


def _finishing(name: JobName) -> str:
    if Flag.TEMPORARY in name.flags:
        return "be aborted: the copy was to be temporary"
    if not name.has_two_phases:
        return "be waited for"
    return f"{ending_of(name).value} in the mirroring phase"


def done(name: JobName, result: Result) -> str:
    """What was done."""
    if result.outcome is Phase.FAILED:
        return f"put away: it had failed: {'; '.join(result.notes)}"
    if result.outcome is Phase.PIVOTED:
        return "pivoted"
    return _done_to_copy(result) if name.verb == "copy" else _done_to_chain(name, result)


def _done_to_copy(result: Result) -> str:
    if result.outcome is Phase.FINISHED:
        return "finished: the copy is consistent"
    if result.removed:
        return "aborted: the incomplete copy was removed"
    return f"aborted: the copy is {'consistent' if result.consistent else 'not usable'}"


def _done_to_chain(name: JobName, result: Result) -> str:
    if result.outcome is Phase.ABORTED:
        return "aborted"
    return "finished: the overlay is kept" if name.has_two_phases else "finished"
