# SPDX-License-Identifier: MIT
"""The state machine, by table: what each QEMU really sends, and what must come of it."""

from __future__ import annotations

import itertools

import pytest

from qmpmirror.life import CANCELLED, Active, Ending, IllegalTransitionError, Life, Phase

STATUSES = [
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]

# Which status may follow which, typed off the JobSTT table of QEMU's job.c: same order, 1 = may.
JOB_STT = """
    undefined  0 1 0 0 0 0 0 0 0 0 0
    created    0 0 1 0 0 0 0 0 1 0 1
    running    0 0 0 1 1 0 1 0 1 0 0
    paused     0 0 1 0 0 0 0 0 0 0 0
    ready      0 0 0 0 0 1 1 0 1 0 0
    standby    0 0 0 0 1 0 0 0 0 0 0
    waiting    0 0 0 0 0 0 0 1 1 0 0
    pending    0 0 0 0 0 0 0 0 1 1 0
    aborting   0 0 0 0 0 0 0 0 1 1 0
    concluded  0 0 0 0 0 0 0 0 0 0 1
    null       0 0 0 0 0 0 0 0 0 0 0
"""
ALLOWED = {
    (before, after)
    for before, *marks in map(str.split, JOB_STT.strip().splitlines())
    for after, mark in zip(STATUSES, marks, strict=True)
    if mark == "1"
}

# One line per measured sequence. "?pivot" asks for an ending, "!" is BLOCK_JOB_CANCELLED; after
# "=>" come the image under the guest and the job's error, then the outcome.
SEQUENCES = {
    "pivot": "created running ready ?pivot waiting pending concluded => target - pivoted",
    "finish": "created running ready ?finish waiting pending concluded => source - finished",
    "soft abort": "created running ready ?abort waiting pending concluded => source - aborted",
    "force abort, ready": (
        "created running ready ?abort aborting ! concluded => source cancelled aborted"
    ),
    "abort, running": "created running ?abort aborting ! concluded => source cancelled aborted",
    "abort, before it ran": "created ?abort aborting ! concluded => source cancelled aborted",
    "abort, user-paused": (
        "created running paused ?abort running aborting ! concluded => source cancelled aborted"
    ),
    "force overrules pivot": (
        "created running ready ?pivot ?force aborting ! concluded => source cancelled aborted"
    ),
    "cancelled while pending": (
        "created running ready ?pivot waiting pending aborting ! concluded"
        " => source cancelled aborted"
    ),
    "failure": "created running aborting concluded => source enospc failed",
    "failure when mirroring": "created running ready aborting concluded => source eio failed",
    "failure while pivoting": (
        "created running ready ?pivot aborting concluded => source eio failed"
    ),
    "failed, yet switched": (
        "created running ready ?pivot waiting pending aborting concluded => target einval pivoted"
    ),
    "failed, dismissed by somebody": (
        "created running ready ?finish aborting concluded null => source - failed"
    ),
    "quit when mirroring, 7.2": (
        "created running ready standby ready standby ready aborting ! concluded"
        " => source cancelled aborted"
    ),
    "quit when mirroring, 5.2": (
        "created running ready waiting pending concluded => source - finished"
    ),
    "somebody else completed it": (
        "created running ready waiting pending concluded => target - pivoted"
    ),
    "somebody else finished it": (
        "created running ready waiting pending concluded => source - finished"
    ),
    "somebody else cancelled it": (
        "created running ready aborting ! concluded => source cancelled aborted"
    ),
    "pivot asked, finished by another": (
        "created running ready ?pivot waiting pending concluded => source - finished"
    ),
    "unplugged when mirroring": (
        "created running ready ?pivot waiting pending concluded => other - failed"
    ),
    "blips": (
        "created running paused running paused running ready standby ready standby ready"
        " ?pivot standby ready waiting pending concluded => target - pivoted"
    ),
    "repeated": (
        "created created running running ready ready ready ?finish ready waiting waiting pending"
        " pending concluded concluded => source - finished"
    ),
    "an empty source": "created running ready ?pivot waiting pending concluded => target - pivoted",
    "dismissed at once": (
        "created running ready ?pivot waiting pending concluded null => target - pivoted"
    ),
}
ERRORS = {
    "-": "",
    "cancelled": CANCELLED,
    "enospc": "No space left on device",
    "eio": "Input/output error",
    "einval": "Invalid argument",
}


def play(life: Life, words: str) -> list[Phase]:
    """Feed a line of the table; return the phase after each word."""
    phases = []
    for word in words.split():
        if word == "?force":
            life.ask(Ending.ABORT, force=True)
        elif word.startswith("?"):
            life.ask(Ending(word[1:]))
        elif word == "!":
            life.cancelled = True
        else:
            life.feed(word)
        phases.append(life.phase)
    return phases


def lived(words: str) -> Life:
    life = Life()
    play(life, words)
    return life


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_what_comes_of_each_sequence(sequence: str) -> None:
    words, _, end = sequence.partition("=>")
    active, error, outcome = end.split()
    life = lived(words)
    assert life.concluded
    assert not life.phase.over
    assert life.conclude(ERRORS[error], Active(active)) is Phase(outcome)
    assert life.phase is Phase(outcome)
    assert life.phase.over


@pytest.mark.parametrize(
    ("words", "phases"),
    [
        ("created running ready", "copying copying mirroring"),
        ("created running paused running", "copying copying copying copying"),
        (
            "created running ready standby ready standby",
            "copying copying mirroring mirroring mirroring mirroring",
        ),
        (
            "created running ready ?pivot standby ready waiting pending concluded null",
            "copying copying mirroring" + 7 * " pivoting",
        ),
        (
            "created running ready ?finish waiting pending concluded",
            "copying copying mirroring" + 4 * " finishing",
        ),
        (
            "created running ready ?abort standby ready waiting pending concluded",
            "copying copying mirroring" + 6 * " aborting",
        ),
        ("created running ?abort aborting ! concluded", "copying copying" + 4 * " aborting"),
        ("created running ?abort ready", "copying copying aborting aborting"),
        (
            "created running ready ?pivot ?force aborting",
            "copying copying mirroring pivoting aborting aborting",
        ),
        ("created running aborting concluded", "copying copying copying copying"),
    ],
)
def test_the_phase_on_the_way(words: str, phases: str) -> None:
    assert play(Life(), words) == [Phase(word) for word in phases.split()]


def test_only_ready_says_mirroring() -> None:
    """Not the offset and the length: an empty source has 0 of 0 from the start."""
    life = lived("created running")
    assert not life.mirrored
    life.feed("ready")
    assert life.mirrored


def test_an_ending_outlives_the_blips() -> None:
    life = lived("created running ready ?pivot standby ready standby ready")
    assert (life.phase, life.asked) == (Phase.PIVOTING, Ending.PIVOT)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(STATUSES, STATUSES)])
def test_every_pair_of_statuses(before: str, after: str) -> None:
    life = Life(status=before)
    if before == after or (before, after) in ALLOWED:
        life.feed(after)
        assert life.status == after
    else:
        with pytest.raises(IllegalTransitionError, match=f"^{after} cannot follow {before} "):
            life.feed(after)
        assert life.status == before
        assert life.phase is Phase.COPYING


@pytest.mark.parametrize("before", STATUSES)
def test_a_status_that_no_qemu_has(before: str) -> None:
    with pytest.raises(IllegalTransitionError, match=r"^dancing cannot follow"):
        Life(status=before).feed("dancing")


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase.over])
def test_nothing_follows_the_end(phase: Phase) -> None:
    life = Life(phase=phase, status="ready", mirrored=True, asked=Ending.PIVOT)
    for step in (
        lambda: life.feed("waiting"),
        lambda: life.ask(Ending.FINISH),
        lambda: life.ask(Ending.ABORT, force=True),
        life.refused,
        lambda: life.conclude("", Active.SOURCE),
    ):
        with pytest.raises(IllegalTransitionError):
            step()
    life.lose()
    assert life.phase is phase


def test_which_phases_are_the_end() -> None:
    over = {phase.value for phase in Phase if phase.over}
    assert over == {"pivoted", "finished", "aborted", "failed", "lost"}


# --- asking for an ending --------------------------------------------------------------------

BEFORE_MIRRORING = ["", "created", "created running", "created running paused"]
MIRRORING = ["created running ready", "created running ready standby"]
LEAVING = [
    "created running ready waiting",
    "created running ready waiting pending",
    "created running aborting",
    "created running ready waiting pending concluded",
    "created running aborting concluded null",
]


@pytest.mark.parametrize("words", BEFORE_MIRRORING)
@pytest.mark.parametrize("ending", [Ending.PIVOT, Ending.FINISH])
def test_no_consistent_ending_before_the_mirroring_phase(words: str, ending: Ending) -> None:
    life = lived(words)
    with pytest.raises(IllegalTransitionError, match=f"^{ending.value} needs the mirroring phase$"):
        life.ask(ending)
    assert (life.phase, life.asked) == (Phase.COPYING, None)


@pytest.mark.parametrize("words", BEFORE_MIRRORING)
def test_an_abort_is_possible_at_any_time(words: str) -> None:
    life = lived(words)
    life.ask(Ending.ABORT)
    assert (life.phase, life.asked) == (Phase.ABORTING, Ending.ABORT)


@pytest.mark.parametrize("words", MIRRORING)
@pytest.mark.parametrize(
    ("ending", "phase"),
    [
        (Ending.PIVOT, Phase.PIVOTING),
        (Ending.FINISH, Phase.FINISHING),
        (Ending.ABORT, Phase.ABORTING),
    ],
)
def test_every_ending_in_the_mirroring_phase(words: str, ending: Ending, phase: Phase) -> None:
    life = lived(words)
    life.ask(ending)
    assert (life.phase, life.asked) == (phase, ending)


@pytest.mark.parametrize("words", LEAVING)
@pytest.mark.parametrize("ending", Ending)
@pytest.mark.parametrize("force", [False, True])
def test_too_late_for_any_ending(words: str, ending: Ending, force: bool) -> None:
    life = lived(words)
    with pytest.raises(IllegalTransitionError, match=r"cannot follow"):
        life.ask(ending, force=force)
    assert life.asked is None


@pytest.mark.parametrize(("first", "second"), [*itertools.product(Ending, Ending)])
def test_an_ending_is_asked_for_once(first: Ending, second: Ending) -> None:
    life = lived("created running ready")
    life.ask(first)
    with pytest.raises(IllegalTransitionError, match=f"^{second.value} cannot follow"):
        life.ask(second)
    assert life.asked is first


@pytest.mark.parametrize("first", Ending)
def test_only_a_forced_abort_overrules(first: Ending) -> None:
    for second in (Ending.PIVOT, Ending.FINISH):
        life = lived("created running ready")
        life.ask(first)
        with pytest.raises(IllegalTransitionError):
            life.ask(second, force=True)
        assert life.asked is first
    life = lived("created running ready")
    life.ask(first)
    life.ask(Ending.ABORT, force=True)
    assert (life.phase, life.asked) == (Phase.ABORTING, Ending.ABORT)


@pytest.mark.parametrize(
    ("words", "phase"),
    [
        ("created running ready ?pivot", Phase.MIRRORING),
        ("created running ready ?finish standby", Phase.MIRRORING),
        ("created running ?abort", Phase.COPYING),
        ("created running ?abort ready", Phase.MIRRORING),
    ],
)
def test_a_refused_ending_leaves_the_job_as_before(words: str, phase: Phase) -> None:
    life = lived(words)
    life.refused()
    assert (life.phase, life.asked) == (phase, None)
    life.ask(Ending.ABORT)


def test_nothing_was_asked_that_could_be_refused() -> None:
    with pytest.raises(IllegalTransitionError, match=r"^no ending is under way$"):
        lived("created running ready").refused()


# --- the end ---------------------------------------------------------------------------------

NOT_OVER = [status for status in STATUSES if status not in {"concluded", "null"}]


@pytest.mark.parametrize("status", NOT_OVER)
def test_no_verdict_before_qemu_has_ended_the_job(status: str) -> None:
    life = Life(status=status)
    with pytest.raises(IllegalTransitionError, match=f"^not concluded but {status}"):
        life.conclude("", Active.SOURCE)
    assert life.phase is Phase.COPYING


@pytest.mark.parametrize("asked", [None, *Ending])
@pytest.mark.parametrize("error", ["", CANCELLED, "Input/output error"])
@pytest.mark.parametrize("active", Active)
def test_the_verdict(asked: Ending | None, error: str, active: Active) -> None:
    """The graph comes first, then the error, and what was meant comes last."""
    life = Life.resume("concluded", asked, mirrored=True)
    if active is Active.TARGET:
        expected = Phase.PIVOTED
    elif active is Active.OTHER:
        expected = Phase.FAILED
    elif error:
        expected = Phase.ABORTED if error == CANCELLED else Phase.FAILED
    else:
        expected = Phase.ABORTED if asked is Ending.ABORT else Phase.FINISHED
    assert life.conclude(error, active) is expected


@pytest.mark.parametrize("asked", [None, *Ending])
def test_a_forced_cancel_is_an_abort_even_if_its_error_is_lost(asked: Ending | None) -> None:
    life = Life.resume("null", asked, mirrored=True)
    life.cancelled = True
    assert life.conclude("", Active.SOURCE) is Phase.ABORTED


@pytest.mark.parametrize("asked", ["", "?pivot", "?finish", "?abort"])
def test_a_job_that_gave_up_is_never_taken_for_a_good_copy(asked: str) -> None:
    """Somebody else may have dismissed the job, and its error is gone with it."""
    life = lived(f"created running ready {asked} aborting concluded null")
    assert life.conclude("", Active.SOURCE) is Phase.FAILED


def test_there_is_one_verdict() -> None:
    life = lived("created running ready waiting pending concluded")
    life.conclude("", Active.SOURCE)
    with pytest.raises(IllegalTransitionError):
        life.conclude("", Active.TARGET)
    assert life.phase is Phase.FINISHED


@pytest.mark.parametrize("words", ["", *MIRRORING, *LEAVING, "created running ready ?pivot"])
def test_the_connection_is_lost(words: str) -> None:
    life = lived(words)
    life.lose()
    assert life.phase is Phase.LOST
