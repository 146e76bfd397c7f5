# SPDX-License-Identifier: MIT
"""Two qmpmirror processes at once on one QEMU and on one disk, in every order that matters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.qemu.clients import FILTERED, PLAIN, Scene, talk
from tests.qemu.program import GOES_ON, PINNED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.qemu.clients import Client, Said
    from tests.qemu.conftest import Boot, Cli, Layers, Unchanged


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, boot: Boot, layers: Layers, cli: Cli, tmp_path: Path
) -> Iterator[Scene]:
    with talk(boot, layers, cli, tmp_path, getattr(request, "param", PLAIN)) as made:
        yield made


both_disks = pytest.mark.parametrize("scene", [PLAIN, FILTERED], indirect=True, ids=["", "filter"])


@pytest.mark.parametrize("speed", [PINNED, ("--wait",)], ids=["copying", "mirroring"])
def test_second_copy_of_a_disk_is_refused(
    scene: Scene, unchanged: Unchanged, speed: tuple[str, ...]
) -> None:
    first, second = scene.layers.folder / "first", scene.layers.folder / "second"
    assert scene.client("blockcopy", "vda", first, *speed).end()[0] == 0
    job = scene.job
    why = f"disk 'vda' already has a block job: {job}"
    with unchanged(scene.vm, scene.layers.folder):
        code, stdout, stderr = scene.client("blockcopy", "vda", second, "--pivot").end()
        assert (code, stdout, stderr) == (
            4,
            "",
            f"error: {why} (end that one first: see qmpmirror blockjob, and qmpmirror recover)\n",
        )
        code, stdout, stderr = scene.client("blockcopy", "vda", second, "--json").end()
        (result,) = map(json.loads, stdout.splitlines())
        assert (code, stderr) == (4, "")
        assert result.items() >= {"error": "DiskBusy", "exit": 4, "message": why}.items()
    assert scene.job == job


@both_disks
def test_two_copies_of_a_disk_that_start_at_once(scene: Scene) -> None:
    copies = [scene.layers.folder / name for name in ("first", "second")]
    first, second = (
        scene.held("blockdev-mirror", "blockcopy", "vda", copy, "--shallow") for copy in copies
    )
    assert first.end()[:2] == (0, "Block Copy started\n")
    job = scene.job
    code, stdout, stderr = second.end()
    why = "error: disk 'vda' has got a block job meanwhile, or another user: "
    assert (code, stdout, stderr.splitlines()[-1][: len(why)]) == (4, "", why)
    assert scene.job == job
    assert [copy.exists() for copy in copies] == [True, False]
    assert scene.client("recover", "--undo").end()[0] == 0
    scene.check_clean(str(scene.layers.snap2))


@both_disks
@pytest.mark.parametrize("hold", ["block-dirty-bitmap-add", "job-complete", "job-dismiss"])
def test_two_pivots_send_one_job_complete(scene: Scene, hold: str) -> None:
    copy = scene.mirroring()
    first = scene.held(hold, "blockjob", "vda", "--pivot")
    second = scene.client("blockjob", "vda", "--pivot", hold=hold)
    second.until_held()
    answers = [second.end(), first.end()]
    assert scene.completions() == 1
    winners = [(code, stdout) for code, stdout, _ in answers if code == 0]
    assert winners
    assert set(winners) == {(0, "Successfully pivoted\n")}
    for code, stdout, stderr in answers:
        if code:
            assert (code, stdout) == (4, "")
            assert stderr.splitlines()[-1] == "error: the copy of vda is being ended already"
    scene.check_clean(str(copy))


@pytest.mark.parametrize("depth", ["--shallow", "--raw"])
def test_who_comes_second_to_a_destination_does_not_remove_what_the_first_has_made(
    scene: Scene, depth: str
) -> None:
    spare = scene.layers.images.create(
        scene.layers.folder / "spare.qcow2", backing=scene.layers.base
    )
    file = {"driver": "file", "filename": str(spare)}
    scene.execute("blockdev-add", driver="qcow2", node_name="fmt1", file=file)
    scene.execute("device_add", driver="virtio-blk-pci", drive="fmt1", id="dev1")
    copy, content = scene.layers.folder / "copy", scene.layers.content(scene.layers.snap2)
    # For both there is nothing yet at the destination.
    first, second = (
        scene.held("blockdev-create", "blockcopy", disk, copy, depth, "--wait")
        for disk in ("vda", "vdb")
    )
    assert first.end() == (0, "Now in mirroring phase\n", GOES_ON)
    code, stdout, stderr = second.end()
    assert (code, stdout) == (4, "")
    assert stderr.startswith(f"error: {copy}: ")
    assert scene.client("blockjob", "vda", "--pivot").end()[:2] == (0, "Successfully pivoted\n")
    assert scene.layers.content(copy, "raw" if depth == "--raw" else "qcow2") == content
    nodes = scene.execute("query-named-block-nodes")
    assert {"fmt1"} < {node["node-name"] for node in nodes}
    assert scene.execute("query-jobs") == []


ENDINGS = {
    "pivot": ("job-complete", "Successfully pivoted\n"),
    "finish": ("block-job-cancel", "Successfully copied\n"),
    "abort": ("block-job-cancel", "Copy aborted\n"),
}
MARK = "block-dirty-bitmap-add"
EXCLUSIVE = [("pivot", "abort"), ("abort", "pivot"), ("finish", "pivot")]


def begin(scene: Scene, ending: str, copy: Path | None, hold: str) -> tuple[Client, Path]:
    """Begin to end a copy, which a finish starts itself, and wait until it is held back."""
    if ending == "finish":
        copy = scene.layers.folder / "copy.qcow2"
        return scene.held(hold, "blockcopy", "vda", copy, "--shallow", "--finish"), copy
    return scene.held(hold, "blockjob", "vda", f"--{ending}"), copy or scene.mirroring()


def check_one_has_won(scene: Scene, copy: Path, winner: str, won: Said, lost: Said) -> None:
    """What both say must be what has happened."""
    pivoted = winner == "pivot"
    assert won[:2] == (0, ENDINGS[winner][1]), won
    outcome = "pivoted" if pivoted else "finished"
    assert lost[:2] == (1, f"Copy failed: somebody else ended it: {outcome}\n"), lost
    image = copy if pivoted else scene.layers.snap2
    assert f"the guest runs on {copy}" in lost[2] or not pivoted
    assert scene.completions() <= 1 + (not pivoted)
    scene.check_clean(str(image))
    assert copy.exists()


@both_disks
@pytest.mark.parametrize(("first", "second"), EXCLUSIVE)
def test_ending_that_was_not_written_down_yet_comes_too_late(
    scene: Scene, first: str, second: str
) -> None:
    copy = None if first == "finish" else scene.mirroring()
    late, copy = begin(scene, first, copy, MARK)
    winner, _ = begin(scene, second, copy, MARK)
    won = winner.end()
    check_one_has_won(scene, copy, second, won, late.end())


@both_disks
@pytest.mark.parametrize(("first", "second"), EXCLUSIVE)
def test_ending_that_was_written_down_but_not_sent_comes_too_late(
    scene: Scene, first: str, second: str
) -> None:
    copy = None if first == "finish" else scene.mirroring()
    winner, copy = begin(scene, first, copy, MARK)
    late, _ = begin(scene, second, copy, ENDINGS[second][0])
    won = winner.end()
    check_one_has_won(scene, copy, first, won, late.end())


@both_disks
@pytest.mark.parametrize(("first", "second"), EXCLUSIVE)
def test_ending_that_was_written_down_is_not_overtaken(
    scene: Scene, first: str, second: str
) -> None:
    copy = None if first == "finish" else scene.mirroring()
    winner, copy = begin(scene, first, copy, ENDINGS[first][0])
    code, stdout, stderr = scene.client("blockjob", "vda", f"--{second}").end()
    assert (code, stdout) == (4, "")
    assert stderr.splitlines()[-1] == "error: the copy of vda is being ended already"
    assert winner.end()[:2] == (0, ENDINGS[first][1])
    scene.check_clean(str(copy if first == "pivot" else scene.layers.snap2))
    assert scene.completions() == (first == "pivot")


@both_disks
@pytest.mark.parametrize("other", ["--pivot", "--abort"])
def test_race_that_nobody_holds_back(scene: Scene, other: str) -> None:
    for _ in range(3):
        source, copy = scene.active, scene.mirroring()
        clients = [scene.client("blockjob", "vda", ending) for ending in ("--pivot", other)]
        answers = [client.end() for client in clients]
        done = [stdout for code, stdout, _ in answers if code == 0]
        assert done, answers
        pivoted = "Successfully pivoted\n" in done
        assert scene.active == (str(copy) if pivoted else source)
        assert not (pivoted and "Copy aborted\n" in done), answers
        for code, stdout, stderr in answers:
            assert code in {0, 1, 4}, stderr
            assert code != 1 or "somebody else" in stdout + stderr
            refusal = stderr.splitlines()[-1] if code == 4 else ""
            assert code != 4 or "being ended" in refusal or "does not have an active" in refusal
        scene.check_clean(scene.active)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scene", [FILTERED], indirect=True, ids=["filter"])
@pytest.mark.parametrize("other", ["blockjob vda --pivot", "recover", "recover --finish"])
def test_pivot_with_another_client_before_each_of_its_commands(scene: Scene, other: str) -> None:
    number = 1  # the first one makes the connection
    while True:
        source, copy, before = scene.active, scene.mirroring(), scene.completions()
        first = scene.client("blockjob", "vda", "--pivot", hold=number)
        if not first.until_held():
            break
        answers = [scene.client(*other.split()).end(), first.end()]
        where = f"command {number}, {first.gate.sent[number]}: {answers}"
        pivoted = any("pivoted" in stdout for _, stdout, _ in answers)
        assert scene.vm.running, where
        # Who waits between writing a pivot down and sending it is taken for dead by recover.
        again = pivoted and "recover" in other and first.gate.sent[number] == "job-complete"
        assert scene.completions() - before == pivoted + again, where
        assert any(code == 0 for code, _, _ in answers), where
        assert {code for code, _, _ in answers} <= {0, 1, 4}, where
        assert scene.active == (str(copy) if pivoted else source), where
        scene.check_clean(scene.active)
        number += 1
    assert first.end()[0] == 0
    assert number > 15
