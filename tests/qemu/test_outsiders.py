# SPDX-License-Identifier: MIT
"""An outsider ends the job in the middle of our own ending: what really happened is reported.

libvirt takes an outsider's cancel for its own pivot.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.qemu.clients import FILTERED, PLAIN, Scene, talk
from tests.qemu.program import PINNED, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.qemu.clients import Client
    from tests.qemu.conftest import Boot, Cli, Layers

ENDING_COMMANDS = {
    "pivot": "job-complete",
    "finish": "block-job-cancel",
    "abort": "block-job-cancel",
}
SOMEBODY = "Copy failed: somebody else ended it: "
REPORTS = {
    ("pivot", "complete"): (0, "Successfully pivoted\n"),
    ("finish", "complete"): (1, f"{SOMEBODY}pivoted\n"),
    ("abort", "complete"): (1, f"{SOMEBODY}pivoted\n"),
    ("pivot", "soft"): (1, f"{SOMEBODY}finished\n"),
    ("finish", "soft"): (0, "Successfully copied\n"),
    ("abort", "soft"): (0, "Copy aborted\n"),
    ("pivot", "force"): (1, "Copy aborted\n"),
    ("finish", "force"): (1, "Copy aborted\n"),
    ("abort", "force"): (0, "Copy aborted\n"),
}
"""What we wanted, what an outsider did: exit code and stdout."""


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, boot: Boot, layers: Layers, cli: Cli, tmp_path: Path
) -> Iterator[Scene]:
    with talk(boot, layers, cli, tmp_path, getattr(request, "param", PLAIN)) as made:
        yield made


def begin(scene: Scene, ending: str, hold: str, *options: str) -> tuple[Client, Path]:
    """Begin an ending in the mirroring phase, held back at a command."""
    if ending == "finish":
        scene.copies += 1
        copy = scene.layers.folder / f"copy{scene.copies}.qcow2"
        words = ("--shallow", "--finish", *options)
        return scene.held(hold, "blockcopy", "vda", copy, *words), copy
    copy = scene.mirroring()
    return scene.held(hold, "blockjob", "vda", f"--{ending}", *options), copy


def interfere(scene: Scene, action: str, *, dismiss: bool) -> None:
    """Do what an outsider does, and wait until the job has ended."""
    job = scene.job
    if action == "complete":
        scene.execute("job-complete", id=job)
    else:
        scene.execute("block-job-cancel", device=job, force=action == "force")
    until(lambda: scene.jobs("concluded"))
    if dismiss:
        scene.execute("job-dismiss", id=job)


@pytest.mark.parametrize(
    ("scene", "hold", "dismiss"),
    [(PLAIN, "mark", False), (PLAIN, "ending", True), (FILTERED, "ending", False)],
    indirect=["scene"],
    ids=["before-mark", "dismissed", "filter"],
)
@pytest.mark.parametrize("action", ["complete", "soft", "force"])
@pytest.mark.parametrize("ending", ["pivot", "finish", "abort"])
def test_outsider_is_faster(
    scene: Scene, ending: str, action: str, hold: str, *, dismiss: bool
) -> None:
    content = scene.layers.content(scene.layers.snap2)
    command = "block-dirty-bitmap-add" if hold == "mark" else ENDING_COMMANDS[ending]
    client, copy = begin(scene, ending, command)
    interfere(scene, action, dismiss=dismiss)
    code, stdout, stderr = client.end()
    assert (code, stdout) == REPORTS[ending, action], stderr
    pivoted = action == "complete"
    if pivoted:
        assert f"the guest runs on {copy}; open it next time with: " in stderr
    elif action == "force":
        assert f"{copy} was incomplete and has been removed\n" in stderr
        assert ("somebody else has cancelled it\n" in stderr) is (code == 1)
    assert copy.exists() is (action != "force")
    if copy.exists():
        assert scene.layers.content(copy) == content
    scene.check_clean(str(copy if pivoted else scene.layers.snap2))


@pytest.mark.parametrize("ending", ["pivot", "finish", "abort"])
@pytest.mark.parametrize("action", ["complete", "soft", "force"])
def test_json_tells_what_the_outsider_did(scene: Scene, ending: str, action: str) -> None:
    client, copy = begin(scene, ending, ENDING_COMMANDS[ending], "--json")
    interfere(scene, action, dismiss=True)
    code, stdout, stderr = client.end()
    assert (code, stderr) == (REPORTS[ending, action][0], "")
    *_, result = map(json.loads, stdout.splitlines())
    outcome = {"complete": "pivoted", "soft": "finished", "force": "aborted"}[action]
    if (ending, action) == ("abort", "soft"):
        outcome = "aborted"
    expected = {
        "event": "result",
        "exit": code,
        "outcome": outcome,
        "active": str(copy if action == "complete" else scene.layers.snap2),
        "consistent": action != "force",
        "left": [],
    }
    assert {key: result.get(key) for key in expected} == expected


@pytest.mark.parametrize("ending", ["pivot", "finish", "abort"])
def test_outsider_dismisses_the_job_before_we_do(scene: Scene, ending: str) -> None:
    client, copy = begin(scene, ending, "job-dismiss" if ending != "finish" else "blockdev-del")
    scene.execute("job-dismiss", id=scene.jobs("concluded")[0])
    wanted = {"pivot": "complete", "finish": "soft", "abort": "soft"}[ending]
    code, stdout, _ = client.end()
    assert (code, stdout) == REPORTS[ending, wanted]
    scene.check_clean(str(copy if ending == "pivot" else scene.layers.snap2))


@pytest.mark.parametrize("hold", ["mark", "ending"])
def test_outsider_cancels_a_copy_that_we_abort_while_it_copies(scene: Scene, hold: str) -> None:
    copy = scene.layers.folder / "copy.qcow2"
    assert scene.cli("blockcopy", scene.vm.name, "vda", copy, *PINNED).returncode == 0
    command = "block-dirty-bitmap-add" if hold == "mark" else "job-cancel"
    client = scene.held(command, "blockjob", "vda", "--abort")
    interfere(scene, "force", dismiss=hold == "mark")
    note = f"{copy} was incomplete and has been removed\n"
    assert client.end() == (0, "Copy aborted\n", note)
    scene.check_clean(str(scene.layers.snap2))
