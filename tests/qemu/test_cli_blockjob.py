# SPDX-License-Identifier: MIT
"""``qmpmirror blockjob`` as a program, on jobs that another process has started."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.qemu.program import PINNED, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers, Unchanged

    Said = tuple[int, str, str]

SENSELESS = """
--abort --pivot | --pause --resume | --watch --pivot | --bandwidth 5 --abort | 5 --pause
--bandwidth 5 --raw | --async --bandwidth 5 | --async --info | --async --watch
--force --pivot | --force --pause | --force --raw | --raw --abort | --raw --resume
--bytes --pivot | --bytes --async | 5 6 | --bandwidth -1 | --bandwidth=-1K | --bandwidth 5x
--bandwidth 1.5 | --bandwidth 8E | --bandwidth
"""
BLOCKDEV = "qcow2,node-name=fmt0,file.driver=file,file.filename={}"


@attrs.frozen
class Scene:
    """A QEMU whose ``vda`` runs on ``snap2``, and the copy to be made of it."""

    vm: Qemu
    layers: Layers
    copy: Path
    cli: Cli

    def start(self, *options: str) -> str:
        """Start a copy by a process that ends at once; return the job's id."""
        ran = self.cli("blockcopy", self.vm.name, "vda", self.copy, *options)
        assert ran.returncode == 0, ran.stderr
        return str(self.job["device"])

    def blockjob(self, *options: str) -> Said:
        """Exit code, stdout and stderr of ``blockjob``."""
        ran = self.cli("blockjob", self.vm.name, "vda", *options)
        return ran.returncode, ran.stdout, ran.stderr

    def events(self, *options: str) -> list[dict[str, Any]]:
        """What ``--json`` prints; stderr must be empty and the exit code that of the result."""
        code, stdout, stderr = self.blockjob("--json", *options)
        found = [json.loads(line) for line in stdout.splitlines()]
        assert (found[-1]["event"], found[-1]["exit"], stderr) == ("result", code, "")
        return found

    @property
    def execute(self) -> Callable[..., Any]:
        return self.vm.execute

    @property
    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.execute("query-block-jobs")
        return jobs

    @property
    def job(self) -> dict[str, Any]:
        """The only job, as ``query-block-jobs`` describes it."""
        (job,) = self.jobs
        return job

    def reaches(self, status: str) -> None:
        until(lambda: self.job["status"] == status)

    @property
    def active(self) -> str:
        """The image under the guest's device."""
        (drive,) = self.execute("query-block")
        return str(drive["inserted"]["image"]["filename"])

    @property
    def marks(self) -> list[str]:
        nodes = self.execute("query-named-block-nodes")
        found = [bitmap.get("name", "") for n in nodes for bitmap in n.get("dirty-bitmaps", ())]
        return [name for name in found if name]

    @property
    def source(self) -> str:
        return str(self.layers.snap2)


@pytest.fixture
def scene(boot: Boot, layers: Layers, cli: Cli) -> Scene:
    vm = boot(
        *("-blockdev", BLOCKDEV.format(layers.snap2)),
        *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
        name=f"blockjob-{os.urandom(6).hex()}",
    )
    return Scene(vm, layers, layers.folder / "copy.qcow2", cli)


def test_flags_that_make_no_sense_together_change_nothing(scene: Scene) -> None:
    job = scene.start(*PINNED)
    for words in re.split(r"[|\n]", SENSELESS.strip()):
        code, stdout, stderr = scene.blockjob(*words.split())
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), words
        assert stderr.startswith("error: "), words
    assert scene.job.items() >= {"device": job, "status": "running", "speed": 1}.items()


def test_disk_without_a_job(scene: Scene, unchanged: Unchanged) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        for flags in ("", "--info", "--raw", "--watch"):
            said = (0, "No current block job for vda\n", "")
            assert scene.blockjob(*flags.split()) == said
        assert scene.events() == [{"event": "result", "outcome": "none", "exit": 0}]
        said = (4, "", "error: disk vda does not have an active block job\n")
        for flags in ("--abort", "--async", "--force", "--pivot", "--pause", "--resume", "7"):
            assert scene.blockjob(flags) == said
        assert scene.events("--pivot")[-1].items() >= {"error": "JobNotFound", "exit": 4}.items()


def test_info_in_the_copying_phase(scene: Scene) -> None:
    job = scene.start(*PINNED)
    until(lambda: scene.job["offset"])
    percent = int(10000 * scene.job["offset"] / scene.job["len"]) / 100
    limit = "    Bandwidth limit: 1 bytes/s (1 B/s)\n"
    for flags in ((), ("--info",)):
        said = (0, f"Block Copy: [{percent:5.2f} %]\n{limit}", "")
        assert scene.blockjob(*flags) == said
    raw = f"cur={scene.job['offset']}\n end={scene.job['len']}\n"
    for words in ("--raw", "--raw --bytes --info"):
        said = (0, f" type=Block Copy\n bandwidth=1\n {raw}", "")
        assert scene.blockjob(*words.split()) == said
    info, result = scene.events()
    assert info.items() >= {"event": "job", "id": job, "label": "Block Copy", "speed": 1}.items()
    assert info.items() >= {"ready": False, "offset": scene.job["offset"]}.items()
    assert result == {"event": "result", "outcome": "done", "exit": 0, "job": job}


def test_info_in_the_mirroring_phase(scene: Scene) -> None:
    scene.start("--wait", "--bandwidth", "3MB")
    limit = "    Bandwidth limit: 3000000 bytes/s (2.9 MiB/s)\n"
    assert scene.blockjob() == (0, f"Block Copy: [100.00 %] mirroring\n{limit}", "")
    length = scene.job["len"]
    for flags, bandwidth in (("--raw", 3), ("--raw --bytes", 3000000)):
        raw = f" type=Block Copy\n bandwidth={bandwidth}\n cur={length}\n end={length}\n"
        assert scene.blockjob(*flags.split()) == (0, raw, "")


def test_raw_info_says_all_is_done_in_the_mirroring_phase_only(
    scene: Scene, boot: Boot, tmp_path: Path
) -> None:
    empty = scene.layers.images.create(tmp_path / "empty", 0)
    vm = boot(
        *("-drive", f"if=virtio,format=qcow2,file={empty}"), name=f"empty-{os.urandom(6).hex()}"
    )
    words = ("blockcopy", vm.name, "vda", tmp_path / "copy", "--wait")
    assert scene.cli(*words).returncode == 0
    assert vm.execute("query-block-jobs")[0]["len"] == 0
    said = scene.cli("blockjob", vm.name, "vda", "--raw").stdout
    assert said == " type=Block Copy\n bandwidth=0\n cur=1\n end=1\n"


def test_abort_in_the_copying_phase_removes_the_worthless_copy(
    scene: Scene, unchanged: Unchanged
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        scene.start(*PINNED)
        note = f"{scene.copy} was incomplete and has been removed\n"
        assert scene.blockjob("--abort") == (0, "Copy aborted\n", note)


def test_abort_in_the_copying_phase_says_that_the_users_file_is_not_usable(scene: Scene) -> None:
    scene.copy.touch()
    scene.start(*PINNED)
    note = f"{scene.copy} is incomplete: do not use it\n"
    assert scene.blockjob("--abort") == (0, "Copy aborted\n", note)
    assert scene.copy.exists()
    assert scene.jobs == []


@pytest.mark.parametrize("depth", ["--shallow", "--raw"])
def test_abort_in_the_mirroring_phase_leaves_a_consistent_copy(
    scene: Scene, guest: Callable[..., Any], depth: str
) -> None:
    writer = guest(scene.vm)
    scene.start("--wait", depth)
    writer.scribble()
    expected = bytes(writer.expected)
    note = f"{scene.copy} is a consistent copy\n"
    assert scene.blockjob("--abort") == (0, "Copy aborted\n", note)
    writer.scribble()
    fmt = "raw" if depth == "--raw" else "qcow2"
    assert scene.layers.content(scene.copy, fmt) == expected
    assert (scene.active, scene.jobs) == (scene.source, [])
    writer.check()


def test_force_declares_the_copy_worthless(scene: Scene, unchanged: Unchanged) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        for flags in ("--force", "--abort --force"):
            scene.start("--wait", "--shallow")
            note = f"{scene.copy} was incomplete and has been removed\n"
            assert scene.blockjob(*flags.split()) == (0, "Copy aborted\n", note)


def test_pivot_before_the_mirroring_phase_is_refused(scene: Scene) -> None:
    job = scene.start(*PINNED)
    why = "the copy of vda cannot pivot yet: it is still copying (wait for the mirroring phase)"
    code, stdout, stderr = scene.blockjob("--pivot")
    assert (code, stdout, stderr.splitlines()[-1]) == (4, "", f"error: {why}")
    assert (scene.job["device"], scene.job["status"], scene.marks) == (job, "running", [])
    (result,) = scene.events("--pivot")
    assert result.items() >= {"error": "NotReady", "exit": 4}.items()


def test_pivot_of_a_copy_that_another_process_has_started(
    scene: Scene, guest: Callable[..., Any]
) -> None:
    writer = guest(scene.vm)
    scene.start("--shallow", "--wait", "--bandwidth", "1")
    writer.scribble()
    code, stdout, stderr = scene.blockjob("--pivot")
    assert (code, stdout) == (0, "Successfully pivoted\n")
    assert stderr.startswith(f"the guest runs on {scene.copy}; open it next time with: -blockdev ")
    writer.scribble()
    writer.check()
    assert (scene.active, scene.jobs, scene.marks) == (str(scene.copy), [], [])
    nodes = scene.execute("query-named-block-nodes")
    assert not [node for node in nodes if scene.source in node["file"]]


@pytest.mark.parametrize("flags", ["--pivot", "--abort", "--async"])
def test_async_asks_and_does_not_wait(scene: Scene, flags: str) -> None:
    job = scene.start("--shallow", "--wait")
    ending = "pivot" if flags == "--pivot" else "abort"
    code, stdout, stderr = scene.blockjob("--async", *flags.split())
    assert (code, stdout) == (0, "")
    assert stderr.startswith(f"{ending} asked for: job {job} goes on in QEMU; qmpmirror blockjob")
    scene.reaches("concluded")
    now = str(scene.copy) if ending == "pivot" else scene.source
    assert scene.active == now
    # Putting it away is left to whoever comes next.
    code, stdout, _ = scene.blockjob("--abort")
    pivoted = "Copy failed: somebody else ended it: pivoted\n"
    assert (code, stdout) == ((1, pivoted) if ending == "pivot" else (0, "Copy aborted\n"))
    assert (scene.jobs, scene.active, scene.marks) == ([], now, [])


@pytest.mark.parametrize("asked", ["pivot", "finish", "abort"])
def test_ending_that_was_asked_for_before_gives_way_to_force_only(
    scene: Scene, unchanged: Unchanged, asked: str
) -> None:
    with unchanged(scene.vm, scene.layers.folder):
        run = scene.start("--shallow", "--wait").split("-")[2]
        # Another process has written its wish down, and not sent it yet.
        mark = {"node": f"qmpmirror-{run}-format", "name": f"qmpmirror-{run}-{asked}"}
        scene.execute("block-dirty-bitmap-add", mark)
        for flags in ("--pivot", "--abort", "--pivot --async", "--abort --async"):
            code, stdout, stderr = scene.blockjob(*flags.split())
            assert (code, stdout) == (4, "")
            assert stderr.splitlines()[-1] == "error: the copy of vda is being ended already"
        assert scene.job["status"] == "ready"
        assert scene.blockjob("--force")[:2] == (0, "Copy aborted\n")


@pytest.mark.parametrize(
    ("words", "speed"),
    [
        ("7", 7 << 20),
        ("--bandwidth 7", 7 << 20),
        ("--bandwidth 500K", 500 << 10),
        ("--bandwidth 500k --bytes", 500 << 10),
        ("--bandwidth 2GB", 2 * 10**9),
        ("--bandwidth 4096 --bytes", 4096),
        ("--bandwidth 123B", 123),
        ("--bandwidth 0", 0),
    ],
)
def test_bandwidth_arrives(scene: Scene, words: str, speed: int) -> None:
    scene.start(*PINNED)
    scene.execute("job-pause", id=scene.job["device"])
    assert scene.blockjob(*words.split()) == (0, "", "")
    assert scene.job["speed"] == speed
    result = scene.events(*words.split())
    assert result == [{"event": "result", "outcome": "done", "exit": 0, "job": scene.job["device"]}]
    assert f" bandwidth={speed}\n" in scene.blockjob("--raw", "--bytes")[1]
    assert f" bandwidth={-(-speed >> 20) if speed else 0}\n" in scene.blockjob("--raw")[1]


def test_bandwidth_lets_a_copy_go_on(scene: Scene) -> None:
    scene.start(*PINNED)
    assert scene.blockjob("--bandwidth", "0") == (0, "", "")
    scene.reaches("ready")


def test_pause_and_resume(scene: Scene) -> None:
    job = scene.start(*PINNED)
    assert scene.blockjob("--pause") == (0, "", "")
    until(lambda: scene.job["paused"])
    assert scene.blockjob()[1].splitlines()[-1] == "    paused, I/O status ok"
    assert scene.events()[0]["paused"] is True
    assert scene.blockjob("--bandwidth", "0")[0] == 0
    code, stdout, stderr = scene.blockjob("--pause")
    assert (code, stdout) == (4, "")
    assert stderr == "error: QEMU refused job-pause: Job is already paused\n"
    assert scene.job["paused"]
    assert scene.events("--resume")[-1].items() >= {"exit": 0, "job": job}.items()
    scene.reaches("ready")
    assert "paused" not in scene.blockjob()[1]
    code, stdout, stderr = scene.blockjob("--resume")
    assert (code, stdout) == (4, "")
    assert stderr == "error: QEMU refused job-resume: Can't resume a job that was not paused\n"


@pytest.mark.parametrize("policy", ["stop", "enospc"])
def test_resume_when_a_full_destination_has_been_enlarged(
    scene: Scene, small: Path, guest: Callable[..., Any], policy: str
) -> None:
    writer = guest(scene.vm)
    scene = attrs.evolve(scene, copy=small / "copy.qcow2")
    scene.start("--on-error", policy)
    until(lambda: scene.job["io-status"] == "nospace")
    assert scene.blockjob()[1].splitlines()[-1] == (
        "    paused, I/O status nospace: make room, then --resume"
    )
    assert scene.events()[0]["io_status"] == "nospace"
    writer.scribble()
    enlarge = ["mount", "-o", "remount,size=64m", str(small)]
    subprocess.run(enlarge, check=True, stdin=subprocess.DEVNULL)
    assert scene.blockjob("--resume") == (0, "", "")
    scene.reaches("ready")
    assert scene.blockjob("--pivot")[:2] == (0, "Successfully pivoted\n")
    writer.check()
    assert scene.layers.content(scene.copy) == bytes(writer.expected)


def test_abort_of_a_copy_that_a_full_destination_has_stopped(
    scene: Scene, small: Path, unchanged: Unchanged
) -> None:
    scene = attrs.evolve(scene, copy=small / "copy.qcow2")
    with unchanged(scene.vm, scene.layers.folder):
        scene.start("--on-error", "stop")
        until(lambda: scene.job["io-status"] == "nospace")
        assert scene.blockjob("--abort")[:2] == (0, "Copy aborted\n")
    assert not list(small.iterdir())


@pytest.mark.qemu(">= 8.2")
def test_synchronous_writes_from_now_on(scene: Scene, guest: Callable[..., Any]) -> None:
    writer = guest(scene.vm)
    scene.start("--shallow", "--wait")
    assert scene.job["actively-synced"] is False
    assert scene.blockjob("--synchronous-writes") == (0, "", "")
    until(lambda: scene.job["actively-synced"])
    writer.scribble()
    assert scene.job["actively-synced"] is True
    assert scene.blockjob("--pivot")[0] == 0
    writer.check()


@pytest.mark.qemu("< 8.2")
def test_synchronous_writes_are_refused_where_qemu_cannot_switch(scene: Scene) -> None:
    scene.start("--shallow", "--wait")
    why = "this QEMU cannot switch a running copy to synchronous writes"
    hint = "QEMU 8.2 and newer can; others when the copy is started"
    assert scene.blockjob("--synchronous-writes") == (4, "", f"error: {why} ({hint})\n")
    (result,) = scene.events("--synchronous-writes")
    assert result.items() >= {"error": "Unsupported", "message": why, "hint": hint}.items()
    assert scene.job["status"] == "ready"


@pytest.mark.qemu(">= 8.2")
def test_synchronous_writes_are_refused_where_they_would_corrupt(scene: Scene) -> None:
    scene.start("--shallow", "--wait", "--via", "drive-mirror")
    code, stdout, stderr = scene.blockjob("--synchronous-writes")
    assert (code, stdout) == (4, "")
    assert "synchronous writes would corrupt" in stderr
    assert scene.job["actively-synced"] is False
