# SPDX-License-Identifier: MIT
"""``qmpmirror blockjob`` on jobs of foreign programs, and ``--watch`` while others end a job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph
from tests.qemu.program import DEADLINE, PINNED, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers

SLOW = {"speed": 1}
LIMITED = "    Bandwidth limit: 1 bytes/s (1 B/s)\n"


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    """Its ``vda`` runs on ``snap2``."""
    return boot(
        *("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
        name=f"others-{os.urandom(6).hex()}",
        qmp_sockets=2,
    )


def job_of(vm: Qemu) -> dict[str, Any]:
    (job,) = vm.execute("query-block-jobs")
    return dict(job)


def active(vm: Qemu) -> str:
    (drive,) = vm.execute("query-block")
    return str(drive["inserted"]["image"]["filename"])


@attrs.frozen
class Foreign:
    """A job as a client that knows nothing of qmpmirror starts it; it stays at its beginning."""

    command: str
    label: str
    arguments: dict[str, Any]
    has_target: bool = False

    def start(self, vm: Qemu, layers: Layers, **options: Any) -> None:
        if self.has_target:
            layers.images.create(layers.folder / "foreign", "8M")
            file = {"driver": "file", "filename": str(layers.folder / "foreign")}
            vm.execute("blockdev-add", driver="qcow2", node_name="foreign", file=file)
        vm.execute(
            self.command, {"job-id": "theirs", "device": "fmt0", **self.arguments}, **options
        )


MIRROR = Foreign(
    "blockdev-mirror",
    "Block Copy",
    {"target": "foreign", "sync": "full", "buf-size": 65536},
    has_target=True,
)
STREAM = Foreign("block-stream", "Block Pull", {})
COMMIT = Foreign("block-commit", "Block Commit", {})
BACKUP = Foreign("blockdev-backup", "Backup", {"target": "foreign", "sync": "full"}, True)
ALL = pytest.mark.parametrize("foreign", [MIRROR, STREAM, COMMIT, BACKUP], ids=lambda f: f.label)


@ALL
def test_job_of_a_foreign_client_can_be_seen_and_steered(
    vm: Qemu, layers: Layers, cli: Cli, foreign: Foreign
) -> None:
    def blockjob(*options: str) -> tuple[int, str, str]:
        ran = cli("blockjob", vm.name, "vda", *options)
        return ran.returncode, ran.stdout, ran.stderr

    foreign.start(vm, layers, **SLOW)
    code, stdout, stderr = blockjob()
    assert (code, stderr) == (0, "")
    assert re.fullmatch(rf"{foreign.label}: \[[ \d]\d\.\d\d %\]\n{re.escape(LIMITED)}", stdout)
    raw = rf" type={foreign.label}\n bandwidth=1\n cur=\d+\n end=\d+\n"
    assert re.fullmatch(raw, blockjob("--raw")[1])
    info = json.loads(blockjob("--json")[1].splitlines()[0])
    assert info.items() >= {"event": "job", "id": "theirs", "label": foreign.label}.items()
    assert blockjob("--pause") == (0, "", "")
    until(lambda: job_of(vm)["paused"])
    assert blockjob()[1].splitlines()[-1] == "    paused, I/O status ok"
    assert blockjob("--bandwidth", "500K") == (0, "", "")
    assert job_of(vm)["speed"] == 500 << 10
    assert blockjob("--bandwidth", "1", "--bytes")[0] == 0
    assert blockjob("--resume") == (0, "", "")
    until(lambda: not job_of(vm)["paused"])


@ALL
@pytest.mark.parametrize("flags", [("--pivot",), ("--synchronous-writes",), ("--pivot", "--async")])
def test_only_its_owner_knows_how_to_end_a_foreign_job(
    vm: Qemu, layers: Layers, cli: Cli, foreign: Foreign, flags: tuple[str, ...]
) -> None:
    foreign.start(vm, layers, **SLOW)
    before = GraphSnapshot.take(vm.execute)
    ran = cli("blockjob", vm.name, "vda", *flags)
    why = (
        "job theirs was not started by qmpmirror: it can be shown, limited, paused and aborted,"
        " but only its owner knows how to end it"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (4, "", f"error: {why}\n")
    assert_clean_graph(vm.execute, before)
    assert job_of(vm)["speed"] == 1
    ran = cli("blockjob", vm.name, "vda", "--json", *flags)
    (result,) = map(json.loads, ran.stdout.splitlines())
    assert result.items() >= {"error": "Refused", "exit": 4, "message": why}.items()


@ALL
@pytest.mark.parametrize("flags", ["--abort", "--force", "--async", "--json --abort"])
def test_foreign_job_is_aborted_and_its_nodes_are_left_to_its_owner(
    vm: Qemu, layers: Layers, cli: Cli, foreign: Foreign, flags: str
) -> None:
    foreign.start(vm, layers, **SLOW, auto_dismiss=False)
    ran = cli("blockjob", vm.name, "vda", *flags.split())
    assert ran.returncode == 0, ran.stderr
    (ended,) = until(lambda: [j for j in vm.execute("query-jobs") if j["status"] == "concluded"])
    assert ended["error"] == "Operation canceled"
    if "--json" in flags:
        (result,) = map(json.loads, ran.stdout.splitlines())
        expected = {"event": "result", "outcome": "aborted", "exit": 0, "job": "theirs"}
        assert result == expected
    elif flags == "--async":
        assert ran.stderr == "abort asked for: job theirs ends by itself\n"
        assert ran.stdout == ""
    else:
        assert (ran.stdout, ran.stderr) == ("Job aborted\n", "")
    # Older QEMUs crash when the nodes are looked at before.
    vm.execute("job-dismiss", id="theirs")
    nodes = {node["node-name"] for node in vm.execute("query-named-block-nodes")}
    assert ("foreign" in nodes) is foreign.has_target
    assert active(vm) == str(layers.snap2)


def test_foreign_copy_in_the_mirroring_phase_ends_consistent(
    vm: Qemu, layers: Layers, cli: Cli, guest: Callable[..., Any]
) -> None:
    writer = guest(vm)
    MIRROR.start(vm, layers)
    until(lambda: job_of(vm)["ready"])
    assert cli("blockjob", vm.name, "vda").stdout == "Block Copy: [100.00 %] mirroring\n"
    writer.scribble()
    ran = cli("blockjob", vm.name, "vda", "--abort")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "Job aborted\n", "")
    assert vm.execute("query-jobs") == []
    assert layers.content(layers.folder / "foreign") == bytes(writer.expected)
    assert active(vm) == str(layers.snap2)


def test_foreign_job_that_is_paused_is_aborted_by_force_only(
    vm: Qemu, layers: Layers, cli: Cli
) -> None:
    STREAM.start(vm, layers, **SLOW)
    vm.execute("job-pause", id="theirs")
    ran = cli("blockjob", vm.name, "vda", "--abort")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert "currently paused" in ran.stderr
    assert job_of(vm)["device"] == "theirs"
    assert cli("blockjob", vm.name, "vda", "--abort", "--force").returncode == 0
    assert vm.execute("query-jobs") == []


@pytest.mark.qemu(">= 6, < 10")
@pytest.mark.parametrize("words", ["domblklist", "blockjob --path vda", "recover"])
def test_concluded_stream_does_not_make_us_crash_qemu(
    vm: Qemu, layers: Layers, cli: Cli, words: str
) -> None:
    STREAM.start(vm, layers, auto_dismiss=False)
    until(lambda: vm.execute("query-jobs")[0]["status"] == "concluded")
    command, *options = words.split()
    ran = cli(command, "--domain", vm.name, *options)
    assert (ran.returncode, ran.stdout) == (4, "")
    what = "stream job theirs is concluded and not dismissed: this QEMU would crash"
    assert ran.stderr.startswith(f"error: {what}")
    assert 'job-dismiss {"id": "theirs"}' in ran.stderr
    vm.execute("job-dismiss", id="theirs")
    assert cli(command, "--domain", vm.name, *options).returncode == 0


@attrs.frozen
class Watcher:
    """A ``blockjob --watch`` that is under way."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def end(self) -> int:
        return self.process.wait(DEADLINE)


@pytest.fixture
def watch(vm: Qemu, tmp_path: Path) -> Iterator[Callable[..., Watcher]]:
    """Begin to watch, and wait until the first progress is shown."""
    begun: list[Watcher] = []

    def begin(*options: str) -> Watcher:
        words = [sys.executable, "-W", "error", "-m", "qmpmirror", "blockjob", str(vm.qmp)]
        with (tmp_path / "stdout").open("wb") as out, (tmp_path / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [*words, "vda", "--watch", *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        watcher = Watcher(process, tmp_path)
        begun.append(watcher)
        until(lambda: watcher.stdout or watcher.stderr or process.poll() is not None)
        return watcher

    yield begin
    for watcher in begun:
        watcher.process.kill()
        watcher.process.wait()


@pytest.fixture
def copy(vm: Qemu, layers: Layers, cli: Cli) -> Path:
    """A copy that another process has started, and that stays in the copying phase."""
    destination = layers.folder / "copy.qcow2"
    started = cli("blockcopy", vm.name, "vda", destination, "--shallow", *PINNED)
    assert started.returncode == 0
    return destination


def unpin(vm: Qemu) -> None:
    vm.execute("block-job-set-speed", device=job_of(vm)["device"], speed=0)
    until(lambda: job_of(vm)["ready"])


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("ending", ["--pivot", "--abort", "--force"])
def test_watch_until_another_process_ends_the_copy(
    vm: Qemu,
    layers: Layers,
    cli: Cli,
    copy: Path,
    watch: Callable[..., Watcher],
    ending: str,
    *,
    as_json: bool,
) -> None:
    job = job_of(vm)["device"]
    watcher = watch(*(["--json"] if as_json else []))
    unpin(vm)
    assert cli("blockjob", vm.sockets[1], "vda", ending).returncode == 0
    assert watcher.end() == 0
    image = str(copy if ending == "--pivot" else layers.snap2)
    if as_json:
        *events, result = map(json.loads, watcher.stdout.splitlines())
        assert {event["event"] for event in events} == {"progress"}
        expected = {"event": "result", "outcome": "ended", "exit": 0, "active": image, "job": job}
        assert result == expected
        assert watcher.stderr == ""
        return
    *lines, last = watcher.stderr.splitlines()
    assert last == f"the job has ended; vda is on {image}"
    assert watcher.stdout == ""
    told = {line for line in lines if not re.match(r"Block Copy: \[[ \d]{2,3}\.\d\d %\]", line)}
    assert told <= {"now in the mirroring phase: --pivot or --abort ends it"}


def test_watch_a_foreign_job_until_it_ends(
    vm: Qemu, layers: Layers, watch: Callable[..., Watcher]
) -> None:
    STREAM.start(vm, layers, **SLOW)
    watcher = watch()
    vm.execute("block-job-set-speed", device="theirs", speed=0)
    assert watcher.end() == 0
    assert watcher.stderr.splitlines()[-1] == f"the job has ended; vda is on {layers.snap2}"
    assert layers.chain(layers.snap2) == [str(layers.snap2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_watch_leaves_the_job_alone(
    vm: Qemu, copy: Path, watch: Callable[..., Watcher], number: signal.Signals
) -> None:
    job = job_of(vm)
    watcher = watch()
    watcher.process.send_signal(number)
    assert watcher.end() == 1
    assert watcher.stderr.splitlines()[-1] == "error: interrupted"
    assert job_of(vm).items() >= {"device": job["device"], "status": "running"}.items()
    assert copy.exists()


def test_watch_when_qemu_dies_says_where_the_data_is(
    vm: Qemu, layers: Layers, copy: Path, watch: Callable[..., Watcher]
) -> None:
    watcher = watch()
    vm.kill()
    assert watcher.end() == 6
    where = f"{layers.snap2} holds all that the guest wrote; {copy} is not complete"
    said = f"error: QEMU (pid {vm.pid}) has ended ({where})"
    assert watcher.stderr.splitlines()[-1] == said
