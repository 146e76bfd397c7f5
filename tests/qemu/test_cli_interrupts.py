# SPDX-License-Identifier: MIT
"""Ctrl-C and SIGTERM in every phase of ``qmpmirror blockcopy``."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.qemu.program import Gate, answered, freeze, sent

if TYPE_CHECKING:
    from tests.qemu.conftest import Unchanged
    from tests.qemu.program import Scene


@pytest.mark.parametrize(
    ("command", "signals"),
    [
        ("query-block", 1),
        ("blockdev-create", 1),
        ("blockdev-create", 2),
        ("blockdev-add", 1),
        ("blockdev-add", 2),
        ("blockdev-mirror", 1),
        ("blockdev-mirror", 2),
    ],
)
def test_interrupted_start_is_taken_back(
    scene: Scene, unchanged: Unchanged, command: str, signals: int
) -> None:
    expected = ("", "error: interrupted\n") if command == "query-block" else ("Copy aborted\n", "")
    transcript = scene.folder / "transcript"
    with unchanged(scene.vm, scene.layers.folder), Gate.before(scene.vm, command) as gate:
        program = scene.begin("--wait", "--transcript", str(transcript), domain=str(gate.path))
        assert gate.says() == "held"
        before = transcript.read_text().count('"sent"')
        program.signal(signal.SIGINT)
        if command != "query-block":
            # What takes it back is asked for behind the command that is being held.
            program.until(lambda: transcript.read_text().count('"sent"') > before)
        if signals == 2:
            program.signal(signal.SIGINT)
        gate.open()
        assert program.end() == 1
    assert (program.stdout, program.stderr) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_copying_aborts(
    scene: Scene, unchanged: Unchanged, number: signal.Signals
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        program = scene.pin("--pivot")
        program.signal(number)
        assert program.end() == 1
    assert program.stdout == "Copy aborted\n"
    assert program.stderr.endswith(f"\n{scene.copy} was incomplete and has been removed\n")


def test_second_interrupt_leaves_the_copy_running(scene: Scene) -> None:
    transcript = scene.folder / "transcript"
    program = scene.pin("--wait", "--transcript", str(transcript))
    job = scene.job["id"]
    freeze(scene.vm.pid)
    before = sent(transcript)
    program.signal(signal.SIGINT)
    program.until(lambda: sent(transcript) != before)
    program.signal(signal.SIGINT)
    assert program.end() == 1
    os.kill(scene.vm.pid, signal.SIGCONT)
    assert (scene.job["id"], scene.job["status"]) == (job, "running")
    assert program.stdout == ""
    assert f"\ninterrupted: job {job} goes on in QEMU" in program.stderr
    assert scene.copy.exists()


@pytest.mark.qemu(">= 6.1")  # before, a paused job refuses to complete
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_pivoting_leaves_it_to_qemu(scene: Scene, number: signal.Signals) -> None:
    transcript = scene.folder / "transcript"
    with Gate.before(scene.vm, "job-complete") as gate:
        options = ("--pivot", "--shallow", "--transcript", str(transcript))
        program = scene.begin(*options, domain=str(gate.path))
        assert gate.says() == "held"
        job = scene.job["id"]
        scene.execute("job-pause", id=job)
        gate.open()
        program.until(lambda: answered(transcript, "job-complete"))
        program.signal(number)
        assert program.end() == 1
    assert program.stdout == ""
    assert program.stderr.startswith(f"interrupted: job {job} goes on in QEMU")
    scene.execute("job-resume", id=job)
    scene.reaches("concluded")
    assert scene.active[0] == str(scene.copy)
