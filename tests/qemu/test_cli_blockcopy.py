# SPDX-License-Identifier: MIT
"""``qmpmirror blockcopy`` as a program: what it prints, its exit codes, and what it leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from tests.qemu.program import BLOCKDEV, DRIVE, GOES_ON, PINNED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.qemu.conftest import Boot, Layers, Unchanged
    from tests.qemu.program import Scene


@pytest.mark.parametrize("scene", [DRIVE, BLOCKDEV], indirect=True, ids=["drive", "blockdev"])
def test_the_documented_line(scene: Scene, layers: Layers, cli: Callable[..., Any]) -> None:
    name, copy, expected = scene.vm.name, scene.copy, layers.content(layers.snap2)
    old = layers.digest(layers.snap2)
    line = f"blockcopy --domain {name} vda {copy} --wait --verbose --shallow --pivot --finish"
    ran = cli(*line.split())
    assert (ran.returncode, ran.stdout) == (0, "Successfully pivoted\n")
    assert re.search(r"^Block Copy: \[100\.00 %\]", ran.stderr, re.MULTILINE)
    assert f" vda      {copy}\n" in cli("domblklist", name).stdout
    chain = [str(copy), str(layers.snap1), str(layers.base)]
    assert layers.chain(copy) == scene.active == chain
    nodes = scene.execute("query-named-block-nodes")
    assert not [node for node in nodes if str(layers.snap2) in node["file"]]
    assert not [node for node in nodes if node.get("dirty-bitmaps")]
    assert scene.execute("query-jobs") == []
    assert layers.content(copy) == expected
    scene.write("-P 0x55 1M 4k")
    assert layers.content(copy)[1 << 20 : (1 << 20) + 4096] == b"\x55" * 4096
    assert layers.digest(layers.snap2) == old


SIZES = (
    r"the source is 8\.0 MiB, [^\n]* of it allocated; the copy 8\.0 MiB, [^\n]* of it allocated\n"
)


@pytest.mark.parametrize("depth", [("--shallow",), ()], ids=["shallow", "full"])
@pytest.mark.parametrize(
    ("ending", "message", "state"),
    [
        ((), "Block Copy started", "runs"),
        (("--wait",), "Now in mirroring phase", "ready"),
        (("--pivot",), "Successfully pivoted", "pivoted"),
        (("--finish",), "Successfully copied", "finished"),
        (("--wait", "--finish", "--pivot", "--transient-job"), "Successfully pivoted", "pivoted"),
    ],
    ids=["start", "wait", "pivot", "finish", "both"],
)
def test_messages_and_outcomes(
    scene: Scene, depth: tuple[str, ...], ending: tuple[str, ...], message: str, state: str
) -> None:
    expected = scene.layers.content(scene.layers.snap2)
    below = scene.active[1:]
    speed = PINNED if state == "runs" else ()
    code, stdout, stderr = scene.run(*depth, *ending, *speed)
    assert (code, stdout) == (0, f"{message}\n")
    assert (stderr == GOES_ON) is (state in {"runs", "ready"})
    assert bool(stderr) is (state != "finished")
    if state in {"runs", "ready"}:
        assert scene.job["status"] == {"runs": "running"}.get(state, state)
        assert scene.active[0] == scene.source
        return
    assert scene.execute("query-jobs") == []
    copied = [str(scene.copy), *(below if depth else [])]
    assert scene.active == (copied if state == "pivoted" else [scene.source, *below])
    assert scene.layers.chain(scene.copy) == copied
    assert scene.layers.content(scene.copy) == expected


def test_async_pivot_is_asked_for_and_left_to_qemu(scene: Scene) -> None:
    code, stdout, stderr = scene.run("--pivot", "--async")
    assert (code, stdout) == (0, "")
    assert f"job {scene.job['id']} goes on in QEMU" in stderr
    scene.reaches("concluded")
    assert scene.active[0] == str(scene.copy)


@pytest.mark.parametrize("scene", [DRIVE, BLOCKDEV], indirect=True, ids=["drive", "blockdev"])
def test_launch_options_open_the_copy_next_time(scene: Scene, boot: Boot) -> None:
    expected = scene.layers.content(scene.layers.snap2)
    _, _, stderr = scene.run("--pivot")
    before, words = stderr.rstrip("\n").split("; open it next time with: ")
    assert before == f"the guest runs on {scene.copy}"
    scene.vm.stop()
    device = () if "-drive" in words else ("-device", "virtio-blk-pci,drive=fmt0")
    scene.vm = boot(*shlex.split(words), *device, name=f"cli-{os.urandom(6).hex()}")
    assert scene.active == [str(scene.copy)]
    assert scene.layers.content(scene.copy) == expected
    assert scene.execute("query-block")[0]["qdev"].endswith("virtio-backend")


def test_progress_in_a_pipe_is_plain_lines(scene: Scene) -> None:
    code, stdout, stderr = scene.run("--verbose", "--finish")
    assert (code, stdout) == (0, "Successfully copied\n")
    assert re.fullmatch(
        r"(Block Copy: \[[ \d]\d\.\d\d %\].*\n)*Block Copy: \[100\.00 %\].*\n" + SIZES, stderr
    )


def test_progress_on_a_terminal_is_one_line(scene: Scene) -> None:
    terminal, end = pty.openpty()
    with open(terminal, "rb", buffering=0) as reader:
        with open(end, "wb", buffering=0) as writer:
            program = scene.begin("--verbose", "--finish", stderr=writer)
        assert program.end() == 0
        shown = reader.read(65536).decode()
    progress, _, sizes = shown.partition("\r\n")
    assert re.fullmatch(r"(\rBlock Copy: \[[^\r\n]*\x1b\[K)+", progress)
    assert progress.rindex("\rBlock Copy: [100.00 %]") == progress.rindex("\r")
    assert re.fullmatch(SIZES, sizes.replace("\r\n", "\n"))
    assert program.stdout == "Successfully copied\n"


def test_timeout_aborts_and_removes_the_incomplete_file(scene: Scene, unchanged: Unchanged) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        code, stdout, stderr = scene.run(*PINNED, "--timeout", "0.5")
    assert (code, stdout) == (5, "Copy aborted\n")
    why = "not there within 0.5 s: it is aborted\n"
    assert stderr == f"{why}{scene.copy} was incomplete and has been removed\n"


def test_empty_file_of_the_user_is_never_removed(scene: Scene) -> None:
    scene.copy.touch()
    code, stdout, stderr = scene.run(*PINNED, "--timeout", "0.5")
    assert (code, stdout) == (5, "Copy aborted\n")
    why = "not there within 0.5 s: it is aborted\n"
    assert stderr == f"{why}{scene.copy} is incomplete: do not use it\n"
    assert scene.copy.exists()


@pytest.mark.parametrize(
    ("words", "fmt"),
    [("--raw", "raw"), ("--raw --format raw", "raw"), ("--format raw", "raw"), ("", "qcow2")],
)
def test_format(scene: Scene, words: str, fmt: str) -> None:
    expected = scene.layers.content(scene.layers.snap2)
    assert scene.run("--finish", *words.split())[:2] == (0, "Successfully copied\n")
    assert scene.layers.content(scene.copy, fmt) == expected
    assert (scene.copy.read_bytes()[:4] == b"QFI\xfb") is (fmt == "qcow2")


@pytest.mark.parametrize(
    ("words", "speed"),
    [
        ("7", 7 << 20),
        ("--bandwidth 7", 7 << 20),
        ("--bandwidth 500K", 500 << 10),
        ("--bandwidth 2GB", 2 * 10**9),
        ("--bandwidth 4096 --bytes", 4096),
        ("--bytes 64k", 64 << 10),
        ("", 0),
    ],
)
def test_bandwidth_arrives(scene: Scene, words: str, speed: int) -> None:
    assert scene.run(*words.split()) == (0, "Block Copy started\n", GOES_ON)
    (job,) = scene.execute("query-block-jobs")
    assert job["speed"] == speed


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--granularity 128K", {"granularity": 131072}),
        ("--buf-size 1M", {"buf-size": 1048576}),
        ("--synchronous-writes", {"copy-mode": "write-blocking"}),
        ("--shallow", {"sync": "top"}),
        ("--on-error enospc", {"on-target-error": "enospc", "on-source-error": "report"}),
        ("--transient-job", {"sync": "full"}),
    ],
)
def test_transcript_and_options_that_arrive(
    scene: Scene, tmp_path: Path, words: str, arguments: dict[str, Any]
) -> None:
    transcript = tmp_path / "transcript"
    ran = scene.run("--finish", *words.split(), "--transcript", str(transcript))
    assert ran == (0, "Successfully copied\n", "")
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    sent = {line["id"]: line["message"] for line in lines if line["direction"] == "sent"}
    received = [line for line in lines if line["direction"] == "received"]
    replies = [line for line in received if "id" in line]
    assert sorted(sent) == sorted(line["id"] for line in replies)
    assert all({"return", "error"} & line["message"].keys() for line in replies)
    events = [line["message"]["event"] for line in received if "id" not in line]
    assert {"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"} <= set(events)
    (mirror,) = [m for m in sent.values() if m["execute"] == "blockdev-mirror"]
    assert mirror["arguments"].items() >= arguments.items()
