# SPDX-License-Identifier: MIT
"""Picking up a job that another process has started."""

from __future__ import annotations

import pytest

from qmpmirror.life import Active, Ending, Life, Phase

PHASE_AT = {
    "undefined": Phase.COPYING,
    "created": Phase.COPYING,
    "running": Phase.COPYING,
    "paused": Phase.COPYING,
    "ready": Phase.MIRRORING,
    "standby": Phase.MIRRORING,
    "waiting": Phase.MIRRORING,
    "pending": Phase.MIRRORING,
    "aborting": Phase.COPYING,
    "concluded": Phase.COPYING,
    "null": Phase.COPYING,
}


@pytest.mark.parametrize("status", sorted(PHASE_AT))
def test_a_job_found_at_any_status(status: str) -> None:
    life = Life.resume(status)
    assert (life.phase, life.status, life.asked) == (PHASE_AT[status], status, None)
    assert life.mirrored is (PHASE_AT[status] is Phase.MIRRORING)


@pytest.mark.parametrize("status", sorted(PHASE_AT))
@pytest.mark.parametrize(
    ("asked", "phase"),
    [
        (Ending.PIVOT, Phase.PIVOTING),
        (Ending.FINISH, Phase.FINISHING),
        (Ending.ABORT, Phase.ABORTING),
    ],
)
def test_a_job_found_with_its_ending_asked_for(status: str, asked: Ending, phase: Phase) -> None:
    life = Life.resume(status, asked)
    assert (life.phase, life.asked) == (phase, asked)


@pytest.mark.parametrize("status", sorted(PHASE_AT))
def test_what_was_known_before_is_not_forgotten(status: str) -> None:
    life = Life.resume(status, mirrored=True)
    assert life.mirrored
    assert life.phase is Phase.MIRRORING


@pytest.mark.parametrize(
    "rest",
    [
        "created running ready waiting pending concluded null",
        "running aborting concluded",
        "paused running",
        "ready standby ready waiting pending concluded",
        "standby ready aborting concluded",
        "waiting aborting concluded",
        "pending aborting concluded",
    ],
)
def test_a_job_that_was_picked_up_goes_on(rest: str) -> None:
    first, *statuses = rest.split()
    life = Life.resume(first)
    for status in statuses:
        life.feed(status)
    assert life.status == statuses[-1]


def test_a_job_found_giving_up_has_not_made_a_good_copy() -> None:
    life = Life.resume("aborting", Ending.FINISH)
    life.feed("concluded")
    life.feed("null")
    assert life.conclude("", Active.SOURCE) is Phase.FAILED
