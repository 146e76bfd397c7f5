# SPDX-License-Identifier: MIT
"""``qmpmirror blockcopy`` when QEMU, its storage, or another client ends the copy."""

from __future__ import annotations

import contextlib
import resource
import signal
from typing import TYPE_CHECKING

import pytest

from qmpmirror.testing import CommandError
from tests.qemu.program import PINNED, Gate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.qemu.conftest import Unchanged
    from tests.qemu.program import Scene


@pytest.mark.parametrize("as_json", [False, True])
def test_full_destination_fails_with_the_reason_and_spares_the_guest(
    scene: Scene, small: Path, unchanged: Unchanged, *, as_json: bool
) -> None:
    scene.copy = small / "copy.qcow2"
    with unchanged(scene.vm, scene.layers.folder):
        program = scene.begin("--wait", *(["--json"] if as_json else []))
        assert program.end() == 1
    reason = "No space left on device"
    if as_json:
        assert program.events[-1].items() >= {
            ("event", "result"),
            ("outcome", "failed"),
            ("exit", 1),
            ("reason", reason),
            ("active", scene.source),
            ("removed", True),
        }
    else:
        assert program.stdout == f"Copy failed: {reason}\n"
        assert f"{scene.copy} was incomplete and has been removed\n" in program.stderr
        assert f"the guest runs on {scene.source}\n" in program.stderr
    assert not list(small.iterdir())
    scene.write("-P 0x55 1M 4k")


def test_a_copy_that_an_error_has_stopped_says_so_at_once(scene: Scene, small: Path) -> None:
    """Nobody should wait in silence for a job that waits for them."""
    scene.copy = small / "copy.qcow2"
    program = scene.begin("--wait", "--pivot", "--on-error", "stop")
    program.until(lambda: "stopped by an I/O error: make room" in program.stderr)
    assert program.stderr.count("stopped by an I/O error") == 1
    program.signal(signal.SIGINT)
    assert program.end() == 1
    assert "interrupted: it is aborted\n" in program.stderr
    assert not list(small.iterdir())


def test_a_deadline_names_itself(scene: Scene) -> None:
    code, stdout, stderr = scene.run("--pivot", "--timeout", "1", *PINNED)
    assert (code, stdout) == (5, "Copy aborted\n")
    assert "not there within 1 s: it is aborted\n" in stderr


@pytest.fixture
def limited(scene: Scene) -> Callable[[int], None]:
    """Limits how far QEMU can write into any file."""
    program = scene.folder / "limitable-qemu"
    program.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {scene.vm.binary} \"$@\"\n")
    program.chmod(0o755)
    scene.vm.stop()
    scene.vm.binary = str(program)
    scene.vm.start()

    def limit(size: int) -> None:
        resource.prlimit(scene.vm.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


@pytest.mark.parametrize("dismissed", [False, True], ids=["", "dismissed"])
@pytest.mark.parametrize("ending", ["--wait", "--pivot", "--finish"])
def test_write_error_is_reported_even_when_another_client_dismisses_the_job(
    scene: Scene,
    limited: Callable[[int], None],
    unchanged: Unchanged,
    ending: str,
    *,
    dismissed: bool,
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        program = scene.pin(ending)
        program.freeze()
        limited(1)
        with contextlib.suppress(CommandError):  # it may have failed by now
            scene.unpin()
        scene.reaches("concluded")
        if dismissed:
            scene.execute("job-dismiss", id=scene.job["id"])
        assert program.thaw() == 1
    assert program.stdout == "Copy failed: File too large\n"
    assert f"\nthe guest runs on {scene.source}\n" in program.stderr


@pytest.mark.parametrize("ending", ["", "--pivot"])
def test_source_that_another_client_resizes_at_the_last_moment(scene: Scene, ending: str) -> None:
    with Gate.before(scene.vm, "blockdev-mirror") as gate:
        program = scene.begin(*ending.split(), domain=str(gate.path))
        assert gate.says() == "held"
        scene.execute("block_resize", {"node-name": "fmt0", "size": 16 << 20})
        gate.open()
        assert program.end() == 1
    assert program.stdout == "Copy failed: Source and target image have different sizes\n"
    assert scene.execute("query-jobs") == []
    assert not scene.copy.exists()


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("end", ["kill", "quit"])
def test_qemu_that_ends_while_copying(scene: Scene, end: str, *, as_json: bool) -> None:
    program = scene.pin("--pivot", *(["--json"] if as_json else []))
    if end == "kill":
        scene.vm.kill()
    else:
        scene.execute("quit")
    assert program.end() == 6
    what = f"QEMU (pid {scene.vm.pid}) has ended"
    image = f"{scene.source} holds all that the guest wrote; {scene.copy} is not complete"
    if as_json:
        result = program.events[-1]
        assert (result["event"], result["exit"], result["error"]) == ("result", 6, "ConnectionLost")
        assert (result["message"], result["hint"]) == (what, image)
        assert program.stderr == ""
    else:
        assert program.stdout == ""
        *progress, last = program.stderr.splitlines()
        assert last == f"error: {what} ({image})"
        assert all(line.startswith("Block Copy: [") for line in progress), program.stderr


def test_qemu_that_is_killed_in_the_mirroring_phase(scene: Scene) -> None:
    program = scene.pin("--pivot")
    program.freeze()
    scene.unpin()
    scene.reaches("ready")
    scene.vm.kill()
    assert program.thaw() == 6
    image = f"{scene.source} holds all that the guest wrote; {scene.copy} is not complete"
    assert program.stderr.splitlines()[-1].endswith(f"has ended ({image})")


@pytest.mark.parametrize("with_it", [True, False], ids=["ended", "unknown"])
def test_connection_that_is_lost_while_pivoting(scene: Scene, *, with_it: bool) -> None:
    with Gate.before(scene.vm, "job-complete") as gate:
        program = scene.begin("--pivot", domain=str(gate.path))
        assert gate.says() == "held"
        job = scene.job["id"]
        scene.vm.kill()
        if with_it:  # the process behind the socket ends too
            gate.process.kill()
            gate.process.wait()
        else:
            gate.open()
        assert (program.end(), program.stdout) == (6, "")
    if with_it:
        expected = (
            f"error: QEMU (pid {gate.process.pid}) has ended (the guest was being switched:"
            f" {scene.copy} holds all that it wrote if the switch was done, {scene.source} if not)"
        )
    else:
        expected = (
            f"(job {job} may go on in QEMU; the guest runs on one of both images, as qmpmirror"
            " domblklist shows; qmpmirror recover picks the copy up)"
        )
    assert expected in program.stderr
    assert len(program.stderr.splitlines()) == 1


@pytest.mark.parametrize("dismissed", [False, True], ids=["", "dismissed"])
@pytest.mark.parametrize(
    ("ending", "code", "stdout"),
    [
        ("--wait", 1, "Copy failed: somebody else ended it: pivoted\n"),
        ("--pivot", 0, "Successfully pivoted\n"),
        ("--finish", 1, "Copy failed: somebody else ended it: pivoted\n"),
    ],
)
def test_copy_that_another_client_completes(
    scene: Scene, ending: str, code: int, stdout: str, *, dismissed: bool
) -> None:
    program = scene.pin(ending)
    program.freeze()
    scene.unpin()
    scene.reaches("ready")
    scene.execute("job-complete", id=scene.job["id"])
    scene.reaches("concluded")
    if dismissed:
        scene.execute("job-dismiss", id=scene.job["id"])
    assert (program.thaw(), program.stdout) == (code, stdout)
    assert f"\nthe guest runs on {scene.copy}; open it next time with: " in program.stderr
    assert scene.active[0] == str(scene.copy)
    assert scene.execute("query-jobs") == []


@pytest.mark.parametrize("dismissed", [False, True], ids=["", "dismissed"])
@pytest.mark.parametrize("ending", ["--wait", "--finish"])
def test_copy_that_another_client_cancels(
    scene: Scene, unchanged: Unchanged, ending: str, *, dismissed: bool
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        program = scene.pin(ending)
        program.freeze()
        job = scene.job["id"]
        scene.execute("job-cancel", id=job)
        scene.reaches("concluded")
        if dismissed:
            scene.execute("job-dismiss", id=job)
        assert (program.thaw(), program.stdout) == (1, "Copy aborted\n")
    assert program.stderr.endswith(f"\n{scene.copy} was incomplete and has been removed\n")


@pytest.mark.parametrize("ending", ["--finish", "--pivot"])
def test_paused_copy_is_not_ended_and_goes_on(scene: Scene, ending: str) -> None:
    program = scene.pin(ending)
    program.freeze()
    scene.unpin()
    scene.reaches("ready")
    scene.execute("job-pause", id=scene.job["id"])
    said_by_qemu = scene.vm.version < (6, 1)
    assert (program.thaw(), program.stdout) == (4 if said_by_qemu else 1, "")
    reason = "QEMU refused" if said_by_qemu else "the copy of vda is paused (resume it first"
    assert program.stderr.splitlines()[-1].startswith(f"error: {reason}")
    assert not said_by_qemu or f"\njob {scene.job['id']} goes on in QEMU" in program.stderr
    assert scene.job["status"] in {"ready", "standby"}
    assert scene.active[0] == scene.source


@pytest.mark.parametrize("how", ["interrupt", "timeout"])
def test_copy_that_an_error_has_paused_can_be_aborted(
    scene: Scene, limited: Callable[[int], None], unchanged: Unchanged, how: str
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        program = scene.pin("--on-error", "stop", "--timeout", "600" if how == "interrupt" else "5")
        limited(1)
        with contextlib.suppress(CommandError):
            scene.unpin()
        scene.reaches("paused")
        if how == "interrupt":
            program.signal(signal.SIGINT)
        assert program.end() == (1 if how == "interrupt" else 5)
    assert program.stdout == "Copy aborted\n"
