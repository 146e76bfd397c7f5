# SPDX-License-Identifier: MIT
"""``qmpmirror blockcopy`` as a program: what it prints, its exit codes, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror.testing import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Layers, Unchanged

DRIVE = ("-drive", "if=virtio,format=qcow2,file={}")
BLOCKDEV = (
    *("-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"),
    *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
)
PINNED = ("--bandwidth", "1", "--bytes", "--buf-size", "65536")
"""Holds a copy in the copying phase."""

DEADLINE = 60


def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; what it returned."""
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


@attrs.define
class Program:
    """A command line that is under way."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        freeze(self.process.pid)

    def thaw(self) -> int:
        self.signal(signal.SIGCONT)
        return self.end()

    def end(self) -> int:
        return self.process.wait(DEADLINE)

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds, while the program runs."""
        until(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr


GATE = """
import asyncio, sys

async def main(qemu, path, command):
    async def serve(client, to_client):
        server, to_server = await asyncio.open_unix_connection(qemu)

        async def pass_on(source, sink):
            while chunk := await source.read(65536):
                if command.encode() in chunk:
                    print("held", flush=True)
                    await asyncio.to_thread(sys.stdin.readline)
                sink.write(chunk)
            sink.close()

        await asyncio.gather(pass_on(client, to_server), pass_on(server, to_client))

    async with await asyncio.start_unix_server(serve, path) as listener:
        print("listens", flush=True)
        await listener.serve_forever()

asyncio.run(main(*sys.argv[1:]))
"""


@attrs.define
class Gate:
    """A socket before QEMU's that passes everything on, but holds a command until it is opened."""

    path: Path
    process: subprocess.Popen[str]

    @classmethod
    @contextlib.contextmanager
    def before(cls, vm: Qemu, command: str) -> Iterator[Gate]:
        path = vm.qmp.with_suffix(".gate")
        with subprocess.Popen(
            [sys.executable, "-c", GATE, vm.qmp, path, f'"execute":"{command}"'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            gate = cls(path, process)
            try:
                assert gate.says() == "listens"
                yield gate
            finally:
                process.kill()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def open(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)


def freeze(child: int) -> None:
    """Stop a child process, and wait until it stands still."""
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)


@attrs.define
class Scene:
    """A QEMU whose ``vda`` runs on ``snap2``, and the copy to be made of it."""

    vm: Qemu
    layers: Layers
    copy: Path
    folder: Path
    programs: list[Program]

    def begin(self, *options: str, domain: str = "", stderr: Any = None) -> Program:
        folder = self.folder / f"run{len(self.programs)}"
        folder.mkdir()
        words = ("blockcopy", domain or self.vm.name, "vda", self.copy, *options)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "qmpmirror", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=stderr or err,
            )
        self.programs.append(Program(process, folder))
        return self.programs[-1]

    def run(self, *options: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        program = self.begin(*options)
        return program.end(), program.stdout, program.stderr

    def pin(self, *options: str) -> Program:
        """Begin a copy that stays in the copying phase, and wait until it is there."""
        program = self.begin(*PINNED, "--verbose", *options)
        program.until(lambda: "Block Copy: [" in program.stderr or '"progress"' in program.stdout)
        return program

    def unpin(self) -> None:
        self.execute("block-job-set-speed", device=self.job["id"], speed=0)

    @property
    def execute(self) -> Callable[..., Any]:
        return self.vm.execute

    @property
    def job(self) -> dict[str, Any]:
        (job,) = [job for job in self.execute("query-jobs") if job["type"] == "mirror"]
        return dict(job)

    def reaches(self, status: str, job: str = "") -> None:
        """Wait for the status of the copy, or of another job."""
        job = job or self.job["id"]
        until(lambda: {"id": job, "status": status}.items() <= self.find(job).items())

    def find(self, job: str) -> dict[str, Any]:
        return next(dict(found) for found in self.execute("query-jobs") if found["id"] == job)

    @property
    def active(self) -> list[str]:
        """The backing chain under the guest's device, as QEMU has it open."""
        (drive,) = self.execute("query-block")
        image = drive["inserted"]["image"]
        chain = [image["filename"]]
        while "backing-image" in image:
            image = image["backing-image"]
            chain.append(image["filename"])
        return chain

    @property
    def source(self) -> str:
        return str(self.layers.snap2)

    def write(self, arguments: str) -> None:
        """Let the guest write."""
        (drive,) = self.execute("query-block")
        self.vm.io(drive["qdev"], f"write {arguments}")


@pytest.fixture
def scene(request: pytest.FixtureRequest, boot: Boot, layers: Layers) -> Iterator[Scene]:
    disk = getattr(request, "param", BLOCKDEV)
    vm = boot(*(word.format(layers.snap2) for word in disk), name=f"cli-{os.urandom(6).hex()}")
    made = Scene(vm, layers, layers.folder / "copy.qcow2", layers.folder.parent, [])
    yield made
    for program in made.programs:
        program.process.kill()
        program.process.wait()


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
    assert bool(stderr) is (state == "pivoted")
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
        r"(Block Copy: \[[ \d]\d\.\d\d %\].*\n)*Block Copy: \[100\.00 %\].*\n", stderr
    )


def test_progress_on_a_terminal_is_one_line(scene: Scene) -> None:
    terminal, end = pty.openpty()
    with open(terminal, "rb", buffering=0) as reader:
        with open(end, "wb", buffering=0) as writer:
            program = scene.begin("--verbose", "--finish", stderr=writer)
        assert program.end() == 0
        shown = reader.read(65536).decode()
    assert re.fullmatch(r"(\rBlock Copy: \[[^\r\n]*\x1b\[K)+\r\n", shown)
    assert shown.rindex("\rBlock Copy: [100.00 %]") == shown.rindex("\r", 0, -2)
    assert program.stdout == "Successfully copied\n"


def test_timeout_aborts_and_removes_the_incomplete_file(scene: Scene, unchanged: Unchanged) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        code, stdout, stderr = scene.run(*PINNED, "--timeout", "0.5")
    assert (code, stdout) == (5, "Copy aborted\n")
    assert stderr == f"{scene.copy} was incomplete and has been removed\n"


def test_empty_file_of_the_user_is_never_removed(scene: Scene) -> None:
    scene.copy.touch()
    code, stdout, stderr = scene.run(*PINNED, "--timeout", "0.5")
    assert (code, stdout) == (5, "Copy aborted\n")
    assert stderr == f"{scene.copy} is incomplete: do not use it\n"
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
    assert scene.run(*words.split()) == (0, "Block Copy started\n", "")
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


def sent(transcript: Path) -> list[str]:
    """The commands that were sent, without those that only look at jobs."""
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    commands = [line["message"]["execute"] for line in lines if line["direction"] == "sent"]
    return [command for command in commands if command not in {"query-jobs", "query-block-jobs"}]


def answered(transcript: Path, command: str) -> bool:
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    ids = [line.get("id") for line in lines if line["message"].get("execute") == command]
    received = [line.get("id") for line in lines if line["direction"] == "received"]
    return bool(ids) and ids[-1] in received


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


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 640 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, stdin=subprocess.DEVNULL).returncode:
        pytest.skip("not permitted to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("as_json", [False, True])
def test_full_destination_fails_with_the_reason_and_spares_the_guest(
    scene: Scene, full: Path, unchanged: Unchanged, *, as_json: bool
) -> None:
    scene.copy = full / "copy.qcow2"
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
        }
    else:
        assert program.stdout == f"Copy failed: {reason}\n"
        assert f"the guest runs on {scene.source}\n" in program.stderr
    assert not list(full.iterdir())
    scene.write("-P 0x55 1M 4k")


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
