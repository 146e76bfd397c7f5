# SPDX-License-Identifier: MIT
"""``--json`` and ``--print-qmp`` of ``qmpmirror blockcopy``."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.qemu.program import sent

if TYPE_CHECKING:
    from tests.qemu.conftest import Unchanged
    from tests.qemu.program import Scene


@pytest.mark.parametrize(
    ("options", "code", "fields"),
    [
        ("--pivot", 0, {"outcome": "pivoted", "removed": False, "left": []}),
        ("--finish --shallow", 0, {"outcome": "finished", "consistent": True}),
        ("--wait", 0, {"outcome": "mirroring"}),
        ("--bandwidth 1 --bytes --buf-size 64k", 0, {"outcome": "copying"}),
        ("--bandwidth 1 --bytes --buf-size 64k --timeout 0.5", 5, {"outcome": "aborted"}),
        ("--raw --shallow", 4, {"outcome": "error", "error": "Refused"}),
        ("--pivot --print-qmp", 0, {"outcome": "planned"}),
    ],
)
def test_json_ends_with_the_result(
    scene: Scene, options: str, code: int, fields: dict[str, Any]
) -> None:
    program = scene.begin("--json", *options.split())
    assert (program.end(), program.stderr) == (code, "")
    *others, result = program.events
    expected = {"event": "result", "exit": code, **fields}
    assert {name: result.get(name) for name in expected} == expected
    assert "result" not in {event["event"] for event in others}


@pytest.mark.parametrize("via", ["blockdev-mirror", "drive-mirror"])
@pytest.mark.parametrize("ending", ["", "--pivot", "--finish"])
@pytest.mark.parametrize("depth", ["", "--shallow"])
def test_printed_commands_change_nothing_and_do_the_copy_when_sent(
    scene: Scene, unchanged: Unchanged, depth: str, ending: str, via: str
) -> None:
    expected = scene.layers.content(scene.layers.snap2)
    transcript = scene.folder / "transcript"
    words = f"--via {via} {depth} {ending} --print-qmp --transcript {transcript}"
    with unchanged(scene.vm, scene.layers.folder):
        code, stdout, stderr = scene.run(*words.split())
    assert (code, stderr) == (0, "")
    harmless = re.compile("query-.*|qom-get|x-debug-query-block-graph")
    assert [command for command in sent(transcript) if not harmless.fullmatch(command)] == []
    for command in map(json.loads, stdout.splitlines()):
        if command["execute"] == "block-dirty-bitmap-add":
            scene.reaches("ready")
        scene.execute(command["execute"], command.get("arguments"))
        if command["execute"] in {"job-complete", "block-job-cancel", "blockdev-create"}:
            scene.reaches("concluded", command["arguments"].get("job-id", ""))
    if not ending:
        scene.reaches("ready")
        return
    assert scene.execute("query-jobs") == []
    assert scene.layers.content(scene.copy) == expected
    assert scene.active[0] == (str(scene.copy) if ending == "--pivot" else scene.source)
    names = {node["node-name"] for node in scene.execute("query-named-block-nodes")}
    assert ("fmt0" in names) is (ending != "--pivot")
    assert any(name.startswith("qmpmirror-") for name in names) is (ending == "--pivot")
