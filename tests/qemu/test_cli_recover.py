# SPDX-License-Identifier: MIT
"""``qmpmirror recover`` as a program: what interrupted runs leave is put away, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph
from tests.qemu.program import BLOCKDEV, DRIVE, HINT, PINNED, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers, Unchanged


@attrs.define
class Scene:
    """A QEMU whose ``vda`` runs on ``snap2``, and the copy to be made of it."""

    vm: Qemu
    layers: Layers
    copy: Path
    cli: Cli
    log: Path

    def interrupt(self, *options: str) -> str:
        """Begin a copy, and kill its process in the copying phase; return the job's id."""
        words = ("blockcopy", self.vm.name, "vda", self.copy, *PINNED, "--verbose", *options)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "qmpmirror", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            until(lambda: b"Block Copy: [" in self.log.read_bytes() or process.poll() is not None)
            assert process.poll() is None, self.log.read_text()
        finally:
            process.kill()
            process.wait()
        return str(self.job["id"])

    def until_mirroring(self) -> None:
        self.execute("block-job-set-speed", device=self.job["id"], speed=0)
        self.reaches("ready")

    def recover(self, *options: str) -> list[str]:
        """The lines of stdout; it must succeed."""
        ran = self.cli("recover", self.vm.name, *options)
        assert (ran.returncode, ran.stderr.replace(HINT, "")) == (0, "")
        return ran.stdout.splitlines()

    def says(self, state: str, action: str, image: Path) -> list[str]:
        """What is said of the copy and of the disk."""
        line = f"copy of vda to {self.copy}, {state}: {action}"
        return [line, f"vda: the guest runs on {image}"]

    @property
    def execute(self) -> Callable[..., Any]:
        return self.vm.execute

    @property
    def job(self) -> dict[str, Any]:
        (job,) = self.execute("query-jobs")
        return dict(job)

    def reaches(self, status: str) -> None:
        until(lambda: self.job["status"] == status)

    @property
    def target(self) -> str:
        """The copy's node."""
        return f"qmpmirror-{self.job['id'].split('-')[2]}-format"

    def mark(self, what: str) -> None:
        """Write down in QEMU what a client of ours does before it asks for something."""
        name = self.target.replace("-format", f"-{what}")
        self.execute("block-dirty-bitmap-add", node=self.target, name=name)


def check_ended(scene: Scene, image: Path) -> None:
    """The guest must run on an image, and nothing of ours may be left beside it."""
    assert scene.execute("query-jobs") == []
    (drive,) = scene.execute("query-block")
    assert drive["inserted"]["image"]["filename"] == str(image)
    nodes = scene.execute("query-named-block-nodes")
    ours = {node["node-name"] for node in nodes if node["node-name"].startswith("qmpmirror-")}
    active = drive["inserted"]["node-name"]
    expected = {active, active.replace("format", "storage")} if image == scene.copy else set()
    assert ours == expected
    files = {node["file"] for node in nodes}
    assert (str(scene.layers.snap2) in files) is (image != scene.copy)
    assert not [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ())]


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, boot: Boot, layers: Layers, cli: Cli, tmp_path: Path
) -> Scene:
    disk = getattr(request, "param", BLOCKDEV)
    name = f"recover-{os.urandom(6).hex()}"
    vm = boot(*(word.format(layers.snap2) for word in disk), name=name)
    return Scene(vm, layers, layers.folder / "copy.qcow2", cli, tmp_path / "log")


@pytest.mark.parametrize("options", ["", "--dry-run", "--finish", "--undo", "--undo --dry-run"])
def test_nothing_to_recover(scene: Scene, unchanged: Unchanged, options: str) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        image = scene.layers.snap2
        said = ["Nothing to recover", f"vda: the guest runs on {image}"]
        assert scene.recover(*options.split()) == said
        (result,) = map(json.loads, scene.recover("--json", *options.split()))
        expected = {"event": "result", "outcome": "done", "exit": 0, "active": {"vda": str(image)}}
        assert result == expected


@pytest.mark.parametrize("mirroring", [False, True], ids=["copying", "mirroring"])
@pytest.mark.parametrize("meant", ["--pivot", "--finish", "--wait"])
def test_dry_run_tells_and_changes_nothing(
    scene: Scene, unchanged: Unchanged, meant: str, *, mirroring: bool
) -> None:
    job = scene.interrupt("--shallow", meant)
    if mirroring:
        scene.until_mirroring()
    ending = "pivot" if meant == "--pivot" else "finish"
    state = "mirroring" if mirroring else "copying"
    with unchanged(scene.vm, scene.layers.folder):
        for options, action in (
            ((), "would be left running"),
            (("--finish",), f"would {ending} in the mirroring phase"),
            (("--undo",), "would be aborted"),
        ):
            said = scene.says(state, action, scene.layers.snap2)
            assert scene.recover("--dry-run", *options) == said
        finding, _ = map(json.loads, scene.recover("--dry-run", "--json"))
        assert finding.items() >= {
            ("event", "finding"),
            ("run", job.split("-")[2]),
            ("state", state),
            ("disk", "vda"),
            ("destination", str(scene.copy)),
            ("action", "would be left running"),
        }


def test_running_copy_is_left_running(scene: Scene) -> None:
    job = scene.interrupt("--pivot")
    said = scene.says("copying", "left running", scene.layers.snap2)
    assert scene.recover() == said
    assert (scene.job["id"], scene.job["status"]) == (job, "running")
    assert scene.copy.exists()


@pytest.mark.parametrize("scene", [DRIVE, BLOCKDEV], indirect=True, ids=["drive", "blockdev"])
@pytest.mark.parametrize("depth", [("--shallow",), (), ("--raw",)], ids=["shallow", "full", "raw"])
@pytest.mark.parametrize("meant", ["--pivot", "--finish", "--wait"])
def test_finish_ends_a_copy_as_it_was_meant(
    scene: Scene, guest: Callable[..., Any], depth: tuple[str, ...], meant: str
) -> None:
    writer = guest(scene.vm)
    scene.interrupt(*depth, meant)
    writer.scribble()
    scene.execute("block-job-set-speed", device=scene.job["id"], speed=0)
    state, *_ = scene.recover("--finish")
    image = scene.copy if meant == "--pivot" else scene.layers.snap2
    action = "pivoted" if meant == "--pivot" else "finished: the copy is consistent"
    assert state.endswith(f": {action}")
    assert scene.layers.content(scene.copy, "raw" if "--raw" in depth else "qcow2") == bytes(
        writer.expected
    )
    writer.check()
    check_ended(scene, image)
    assert scene.recover()[0] == "Nothing to recover"


@pytest.mark.parametrize("mirroring", [False, True], ids=["copying", "mirroring"])
def test_undo_takes_a_running_copy_back(
    scene: Scene, unchanged: Unchanged, *, mirroring: bool
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        scene.interrupt("--shallow", "--pivot")
        if mirroring:
            scene.until_mirroring()
        action = "aborted: the incomplete copy was removed"
        state = "mirroring" if mirroring else "copying"
        assert scene.recover("--undo") == scene.says(state, action, scene.layers.snap2)


def test_undo_keeps_a_file_that_the_user_has_made(scene: Scene) -> None:
    scene.copy.touch()
    scene.interrupt("--shallow", "--pivot")
    said = scene.says("copying", "aborted: the copy is not usable", scene.layers.snap2)
    assert scene.recover("--undo") == said
    assert scene.copy.exists()


@pytest.mark.parametrize("options", ["", "--finish", "--undo"])
@pytest.mark.parametrize("mark", ["", "pivot"])
def test_pivot_that_has_ended_is_put_away(scene: Scene, mark: str, options: str) -> None:
    scene.interrupt("--shallow", "--pivot")
    scene.until_mirroring()
    if mark:
        scene.mark(mark)
    scene.execute("job-complete", id=scene.job["id"])
    scene.reaches("concluded")
    before = GraphSnapshot.take(scene.execute)
    said = scene.says("ended", "would be put away", scene.copy)
    assert scene.recover("--dry-run", *options.split()) == said
    assert_clean_graph(scene.execute, before)
    assert scene.recover(*options.split()) == scene.says("ended", "pivoted", scene.copy)
    check_ended(scene, scene.copy)


def test_pivot_from_an_earlier_copy_of_ours_is_one_thing_to_put_away(scene: Scene) -> None:
    earlier = scene.copy
    assert scene.cli("blockcopy", scene.vm.name, "vda", earlier, "--pivot").returncode == 0
    scene.copy = scene.layers.folder / "second.qcow2"
    scene.interrupt("--shallow", "--pivot")
    scene.until_mirroring()
    scene.execute("job-complete", id=scene.job["id"])
    scene.reaches("concluded")
    assert scene.recover("--dry-run") == scene.says("ended", "would be put away", scene.copy)
    assert scene.recover() == scene.says("ended", "pivoted", scene.copy)
    check_ended(scene, scene.copy)
    assert earlier.exists()


@pytest.mark.parametrize("mark", ["", "finish", "abort"])
def test_consistent_copy_that_has_ended_is_put_away(scene: Scene, mark: str) -> None:
    scene.interrupt("--shallow", "--finish")
    scene.until_mirroring()
    expected = scene.layers.content(scene.layers.snap2)
    if mark:
        scene.mark(mark)
    scene.execute("block-job-cancel", device=scene.job["id"])
    scene.reaches("concluded")
    action = "aborted" if mark == "abort" else "finished"
    said = scene.says("ended", f"{action}: the copy is consistent", scene.layers.snap2)
    assert scene.recover() == said
    check_ended(scene, scene.layers.snap2)
    assert scene.layers.content(scene.copy) == expected


@pytest.mark.parametrize("mark", ["", "abort", "pivot"])
def test_copy_that_was_cancelled_is_put_away(scene: Scene, unchanged: Unchanged, mark: str) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        scene.interrupt("--shallow", "--pivot")
        if mark:
            scene.mark(mark)
        scene.execute("job-cancel", id=scene.job["id"])
        scene.reaches("concluded")
        action = "aborted: the incomplete copy was removed"
        assert scene.recover() == scene.says("ended", action, scene.layers.snap2)


@pytest.mark.parametrize("options", ["", "--finish", "--undo"])
@pytest.mark.parametrize("mark", ["pivot", "finish", "abort"])
def test_ending_that_was_written_down_but_never_sent(scene: Scene, mark: str, options: str) -> None:
    scene.interrupt("--shallow", "--wait")
    scene.until_mirroring()
    scene.mark(mark)
    intention = "would be aborted" if options == "--undo" else f"would be seen through: {mark}"
    said = scene.says("ending", intention, scene.layers.snap2)
    assert scene.recover("--dry-run", *options.split()) == said
    pivoted = mark == "pivot" and options != "--undo"
    image = scene.copy if pivoted else scene.layers.snap2
    done = {
        "pivot": "pivoted",
        "finish": "finished: the copy is consistent",
        "abort": "aborted: the copy is consistent",
    }
    action = "aborted: the incomplete copy was removed" if options == "--undo" else done[mark]
    assert scene.recover(*options.split()) == scene.says("ending", action, image)
    check_ended(scene, image)


@pytest.mark.parametrize("state", ["copying", "mirroring", "ended"])
def test_vm_that_a_run_has_stopped_is_let_go_on(scene: Scene, state: str) -> None:
    scene.interrupt("--shallow", "--pivot")
    if state != "copying":
        scene.until_mirroring()
    scene.mark("stopped")
    if state == "ended":
        scene.execute("job-complete", id=scene.job["id"])
        scene.reaches("concluded")
    scene.execute("stop")
    scene.recover("--dry-run")
    assert not scene.execute("query-status")["running"]
    scene.recover()
    assert scene.execute("query-status")["running"]
    nodes = scene.execute("query-named-block-nodes")
    bitmaps = [bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", ())]
    assert not [name for name in bitmaps if name.startswith("qmpmirror-")]


def test_vm_that_somebody_else_has_stopped_stays_so(scene: Scene) -> None:
    scene.interrupt("--shallow", "--pivot")
    scene.execute("stop")
    scene.recover("--undo")
    assert not scene.execute("query-status")["running"]


def test_copy_that_has_failed_is_put_away_with_the_reason(
    scene: Scene, small: Path, unchanged: Unchanged
) -> None:
    scene.copy = small / "copy.qcow2"
    with unchanged(scene.vm, scene.layers.folder):
        scene.interrupt("--pivot")
        scene.execute("block-job-set-speed", device=scene.job["id"], speed=0)
        scene.reaches("concluded")
        action = "put away: it had failed: No space left on device"
        assert scene.recover() == scene.says("ended", action, scene.layers.snap2)
    assert not list(small.iterdir())


@pytest.mark.parametrize("way", ["", "--finish", "--finish --dry-run"])
def test_copy_that_an_error_has_stopped_waits_for_room(scene: Scene, small: Path, way: str) -> None:
    scene.copy = small / "copy.qcow2"
    scene.interrupt("--pivot", "--on-error", "stop")
    scene.execute("block-job-set-speed", device=scene.job["id"], speed=0)
    until(lambda: scene.execute("query-block-jobs")[0]["io-status"] == "nospace")
    why = "an I/O error has stopped it (nospace): make room, then blockjob --resume"
    action = f"would be left: {why}" if way.endswith("--dry-run") else f"left: {why}"
    assert scene.recover(*way.split()) == scene.says("copying", action, scene.layers.snap2)
    scene.recover("--undo")
    assert not list(small.iterdir())


def test_a_source_that_the_user_keeps_is_no_leftover(scene: Scene) -> None:
    """It is an earlier copy of ours that nobody uses, just as an interrupted one is."""
    second = scene.layers.folder / "second.qcow2"
    for words in ([scene.copy], [second, "--keep-source"]):
        assert scene.cli("blockcopy", scene.vm.name, "vda", *words, "--pivot").returncode == 0
    assert scene.recover() == ["Nothing to recover", f"vda: the guest runs on {second}"]
    shown = scene.cli("domblklist", scene.vm.name, "--chain").stdout
    assert f"{scene.copy} [qcow2, " in shown
    assert "<- kept\n" in shown
    assert "under way" not in shown
    assert "looks wrong: none" in scene.cli("doctor", scene.vm.name).stdout
    nodes = scene.execute("query-named-block-nodes")
    assert str(scene.copy) in {node["file"] for node in nodes}
