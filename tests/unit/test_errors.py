# SPDX-License-Identifier: MIT
"""The tree of errors is the one that its module draws."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import qmpmirror
from qmpmirror import errors
from qmpmirror.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator

_BRANCH = re.compile(r"^ {4}(?P<rails>[│ ]*)(?:[├└]── )?(?P<name>[A-Z]\w+)(?P<meaning>  +\S.*)?$")


def descendants(base: type[Error]) -> Iterator[type[Error]]:
    for child in base.__subclasses__():
        if child.__module__.startswith("qmpmirror."):
            yield child
            yield from descendants(child)


EVERY_ERROR: list[type[Error]] = [Error, *descendants(Error)]


def drawn() -> dict[str, str]:
    """Each class of the drawing with its parent."""
    tree: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").replace("qmpmirror.Error", "Error").splitlines():
        match = _BRANCH.match(line)
        if match is None:
            continue
        depth = 0 if "──" not in line else len(match["rails"]) // 4 + 1
        del path[depth:]
        tree[match["name"]] = path[-1] if path else ""
        path.append(match["name"])
    return tree


def test_the_drawing_is_the_tree() -> None:
    real = {
        kind.__name__: next(base.__name__ for base in kind.__bases__ if issubclass(base, Error))
        for kind in EVERY_ERROR[1:]
    }
    assert drawn() == {"Error": "", **real}


def test_the_drawing_was_read() -> None:
    tree = drawn()
    assert tree["DestinationExists"] == "DestinationError"
    assert tree["JobFailed"] == "JobError"
    assert len(tree) > 20


def test_all_errors_live_in_one_module() -> None:
    assert {kind.__module__ for kind in EVERY_ERROR} == {"qmpmirror.errors"}


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_is_public(kind: type[Error]) -> None:
    assert kind.__name__ in qmpmirror.__all__
    assert getattr(qmpmirror, kind.__name__) is kind


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_says_what_it_means(kind: type[Error]) -> None:
    assert kind.__doc__
    assert kind.__doc__.splitlines()[0].endswith(".")


def examples() -> list[Error]:
    """One of each, made as the package makes them."""
    return [
        Error("what"),
        errors.UsageError("what"),
        errors.ConnectError("what", address="vm"),
        errors.NoSuchMonitor("what", address="vm", hint="advice"),
        errors.NotListening("what", address="vm"),
        errors.NotQMP("what", address="vm"),
        errors.MonitorBusy("what", address="vm"),
        errors.AmbiguousDomain("what", candidates=["a", "b"], address="vm"),
        errors.ConnectionLost("what", command="stop", job_id="j"),
        errors.DeadlineExceeded("what"),
        errors.CommandTimeout("stop", 1.5),
        errors.Stalled("what", job_id="j"),
        errors.Refused("what"),
        errors.CommandFailed("stop", {"a": 1}, "No", "GenericError"),
        errors.Unsupported("what", command="c", argument="a.b"),
        errors.DiskError("what", disk="vda", candidates=["vdb"]),
        errors.DiskNotFound("what", disk="vda"),
        errors.AmbiguousDisk("what", disk="vda", candidates=["a", "b"]),
        errors.EmptyDrive("what", disk="hdc"),
        errors.DiskBusy("what", disk="vda", job_id="j"),
        errors.DestinationError("what", destination="/x"),
        errors.DestinationExists("what", destination="/x"),
        errors.JobError("what", job_id="j"),
        errors.NotReady("what", job_id="j"),
        errors.EndingAlreadyAsked("what", job_id="j"),
        errors.JobNotFound("what", job_id="j"),
        errors.JobFailed("what", job_id="j", reason="No", authoritative="/a"),
        errors.MigrationFailed("what", reason="No", runs_on="source"),
    ]


def test_there_is_an_example_of_each() -> None:
    assert {type(error) for error in examples()} == set(EVERY_ERROR)


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_what_every_error_has(error: Error) -> None:
    assert error.description
    assert error.left == ()
    hint = f" ({error.hint})" if error.hint else ""
    assert str(error) == error.description + hint


def test_qemu_s_own_words() -> None:
    made = {type(error).__name__: error for error in examples()}
    assert vars(made["CommandFailed"]) == {
        "description": "QEMU refused stop: No",
        "hint": "",
        "left": (),
        "command": "stop",
        "arguments": {"a": 1},
        "reason": "No",
        "error_class": "GenericError",
    }
    assert str(made["CommandTimeout"]) == (
        "QEMU did not answer stop within 1.5 s (its main loop may be blocked by hanging storage;"
        " the command may still run)"
    )


FIELDS: dict[str, dict[str, object]] = {
    "NoSuchMonitor": {"address": "vm", "hint": "advice"},
    "AmbiguousDomain": {"address": "vm", "candidates": ("a", "b")},
    "ConnectionLost": {"command": "stop", "job_id": "j"},
    "CommandTimeout": {"command": "stop", "seconds": 1.5},
    "Stalled": {"job_id": "j"},
    "Unsupported": {"command": "c", "argument": "a.b"},
    "AmbiguousDisk": {"disk": "vda", "candidates": ("a", "b")},
    "DiskBusy": {"disk": "vda", "job_id": "j", "candidates": ()},
    "DestinationExists": {"destination": "/x"},
    "NotReady": {"job_id": "j"},
    "JobFailed": {"job_id": "j", "reason": "No", "authoritative": "/a"},
    "MigrationFailed": {"reason": "No", "runs_on": "source"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    (error,) = (error for error in examples() if type(error).__name__ == name)
    assert FIELDS[name].items() <= vars(error).items()


def test_a_usage_error_is_a_value_error() -> None:
    assert issubclass(errors.UsageError, ValueError)
