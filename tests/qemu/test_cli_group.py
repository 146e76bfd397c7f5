# SPDX-License-Identifier: MIT
"""``qmpmirror blockcopy`` with several disks."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.qemu.disks import Disks, make_disks
from tests.qemu.program import PINNED, Gate, Program, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing import ImageTools
    from qmpmirror.testing.fake import FakeMonitor
    from tests.qemu.conftest import Boot, GuestAgent, Unchanged


@attrs.define
class Scene:
    """Two disks, and command lines that copy them."""

    disks: Disks
    folder: Path
    programs: list[Program] = attrs.field(factory=list)

    @property
    def specs(self) -> list[str]:
        return [f"--diskspec=vd{n},dest={self.disks.copy(n)}" for n in self.disks]

    def begin(self, *words: str, domain: str = "") -> Program:
        folder = self.folder / f"run{len(self.programs)}"
        folder.mkdir()
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            command = [sys.executable, "-W", "error", "-m", "qmpmirror", "blockcopy"]
            process = subprocess.Popen(
                [*command, domain or str(self.disks.vm.qmp), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.programs.append(Program(process, folder))
        return self.programs[-1]

    def run(self, *words: str) -> tuple[int, str, str]:
        program = self.begin(*words)
        return program.end(), program.stdout, program.stderr


@pytest.fixture
def scene(boot: Boot, images: ImageTools, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(make_disks(boot, images, tmp_path, 2), tmp_path)
    yield made
    for program in made.programs:
        program.process.kill()
        program.process.wait()


@pytest.mark.parametrize(
    ("ending", "words"), [("pivot", "Successfully pivoted"), ("finish", "Successfully copied")]
)
def test_diskspecs(scene: Scene, ending: str, words: str) -> None:
    disks = scene.disks
    specs = [f"{scene.specs[0]},shallow=on", f"{scene.specs[1]},format=qcow2"]
    # Long enough for a busy machine.
    code, out, err = scene.run(*specs, f"--{ending}", "--wait", "--max-freeze", "30000")
    assert (code, out) == (0, f"{words}\n"), err
    assert err.startswith("the guest's writes waited ")
    for number in disks:
        launch = f"vd{'ab'[number]}: the guest runs on {disks.copy(number)}; open it next time with"
        kept = f"vd{'ab'[number]}: {disks.copy(number)} is a consistent copy\n"
        assert (launch if ending == "pivot" else kept) in err
    assert disks.active == [disks.copy(n) if ending == "pivot" else disks.top(n) for n in disks]
    assert disks.images.info(disks.copy(0))["backing-filename"] == str(disks.folder / "base0")
    assert disks.images.info(disks.copy(1))["format"] == "qcow2"
    disks.write(0x61)


def test_all_disks(scene: Scene) -> None:
    out = scene.folder / "out"
    out.mkdir()
    words = ["--all-disks", "--dest-dir", str(out), "--finish", "--max-freeze", "30000"]
    code, _, err = scene.run(*words)
    assert code == 0, err
    names = sorted(path.suffix for path in out.iterdir())
    assert names == [".qcow2", ".raw"]
    for number in scene.disks:
        fmt = scene.disks.fmt(number)
        (copy,) = out.glob(f"*.{fmt}")
        scene.disks.images.compare(scene.disks.top(number), copy, fmt, fmt)


def test_json_names_the_cut(scene: Scene) -> None:
    program = scene.begin(*scene.specs, "--pivot", "--json", "--max-freeze", "30000")
    assert program.end() == 0
    assert program.stderr == ""
    started, *_, result = program.events
    assert started["event"] == "started"
    assert len(started["disks"]) == 2
    assert {event["event"] for event in program.events[1:-2]} == {"progress"}
    assert program.events[-2] == {"event": "mirroring", "group": started["group"]}
    assert result.items() >= {"event": "result", "outcome": "pivoted", "exit": 0}.items()
    assert [each["disk"] for each in result["disks"]] == started["disks"]
    assert [each["outcome"] for each in result["disks"]] == ["pivoted", "pivoted"]
    assert [cut["disk"] for cut in result["cut"]] == started["disks"]
    assert max(cut["pending"] for cut in result["cut"]) <= min(
        cut["finalized"] for cut in result["cut"]
    )
    assert all(cut["freeze"] == cut["finalized"] - cut["pending"] for cut in result["cut"])
    assert result["freeze"] >= max(cut["freeze"] for cut in result["cut"])


BAD = [
    (["--diskspec=vd0,dest={x}"], 2, "several disks need --pivot or --finish"),
    (["vd0", "{x}", "--diskspec=vd1,dest={x}y", "--finish"], 2, "take the place of PATH and DEST"),
    (["--diskspec=vd0,dest={x}", "--all-disks", "--dest-dir={x}", "--finish"], 2, "give either"),
    (["--all-disks", "--finish"], 2, "--all-disks and --dest-dir need each other"),
    (["--diskspec=vd0,dest={x}", "--dest-dir={x}", "--finish"], 2, "need each other"),
    (["vd0", "{x}", "--dest-dir={x}", "--finish"], 2, "need each other"),
    (["--diskspec=vd0,dest={x}", "--finish", "--quiesce"], 2, "--quiesce and --agent need each"),
    (["--diskspec=vd0,dest={x}", "--finish", "--agent={x}"], 2, "--quiesce and --agent need each"),
    (["vd0", "{x}", "--finish", "--quiesce", "--agent={x}"], 2, "--quiesce goes with"),
    (["--diskspec=vd0,dest={x}", "--finish", "--print-qmp"], 2, "--print-qmp shows one disk"),
    (["--diskspec=vd0,dest={x}", "--finish", "--async"], 2, "--async leaves one disk to QEMU"),
    (["--diskspec=vd0,dest={x}", "--finish", "--max-freeze=0"], 2, "--max-freeze: '0' is no"),
    (["--diskspec=vd0,dest={x}", "--finish", "--max-freeze=nan"], 2, "--max-freeze: 'nan' is no"),
    (["--diskspec=vd0", "--finish"], 2, "'vd0' needs DISK,dest=DEST"),
    (["--diskspec=,dest={x}", "--finish"], 2, "needs DISK,dest=DEST"),
    (["--diskspec=vd0,dest", "--finish"], 2, "'vd0,dest': not DISK,dest=DEST,KEY=VALUE"),
    (["--diskspec=vd0,dest={x},speed=1", "--finish"], 2, "speed is unknown"),
    (["--diskspec=vd0,dest={x},shallow=perhaps", "--finish"], 2, "is neither on nor off"),
    (["--diskspec=vd9,dest={x}", "--finish"], 4, "vd9"),
    (["--diskspec=vd0,dest=/nowhere/x", "--finish"], 4, "/nowhere"),
    (["{spec}", "--diskspec=vd0,dest=/nowhere/x", "--finish"], 4, "/nowhere"),
    (["{spec}", "--diskspec=vd0,dest={x}y", "--finish"], 2, "was given twice"),
    (["{spec}", "--diskspec=vd1,dest={copy}", "--finish"], 2, "was given twice"),
    (["--diskspec=vd0,dest={x},format=raw,shallow=on", "--finish"], 4, "cannot have a backing"),
    (["--all-disks", "--dest-dir=/nowhere", "--finish"], 4, "/nowhere"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(
    scene: Scene, unchanged: Unchanged, words: list[str], code: int, sentence: str
) -> None:
    x = scene.folder / "x"
    words = [word.format(x=x, copy=scene.disks.copy(0), spec=scene.specs[0]) for word in words]
    with unchanged(scene.disks.vm, scene.disks.folder):
        done, out, err = scene.run(*words)
    assert (done, out) == (code, ""), err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert sentence in err
    assert not x.exists()


@pytest.mark.parametrize("as_json", [False, True])
async def test_the_freeze_has_a_limit(
    scene: Scene, unchanged: Unchanged, fake_monitor: Callable[..., FakeMonitor], *, as_json: bool
) -> None:
    vm = scene.disks.vm
    with unchanged(vm, scene.disks.folder):
        async with fake_monitor(upstream=vm.qmp) as fake:

            def end(arguments: dict[str, Any]) -> Any:
                # As if the guest wrote too fast for the second one to end.
                first = fake.commands.count("block-job-cancel") == 1
                return vm.execute("block-job-cancel", arguments) if first else {}

            fake.on("block-job-cancel", end)
            words = [*scene.specs, "--finish", "--max-freeze", "40", *(["--json"] * as_json)]
            program = scene.begin(*words, domain=str(fake.path))
            assert await asyncio.to_thread(program.end) == 5
        scene.disks.write(0)
    sentence = "the guest's writes would have waited more than 40 ms; all copies were rolled back"
    if as_json:
        assert program.events[-1].items() >= {"exit": 5, "message": sentence}.items()
    else:
        assert (program.stdout, program.stderr[:7]) == ("", "error: ")
        assert sentence in program.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_copying(
    scene: Scene, unchanged: Unchanged, number: signal.Signals
) -> None:
    with unchanged(scene.disks.vm, scene.disks.folder):
        program = scene.begin(*scene.specs, "--pivot", "--verbose", *PINNED)
        program.until(lambda: "Block Copy: [" in program.stderr)
        program.signal(number)
        assert program.end() == 1
    assert program.stdout == "Copy aborted\n"


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("command", ["blockdev-create", "blockdev-mirror"])
def test_interrupted_start(scene: Scene, unchanged: Unchanged, command: str, signals: int) -> None:
    transcript = scene.folder / "transcript"
    with (
        unchanged(scene.disks.vm, scene.disks.folder),
        Gate.before(scene.disks.vm, command) as gate,
    ):
        words = [*scene.specs, "--pivot", "--transcript", str(transcript)]
        program = scene.begin(*words, domain=str(gate.path))
        assert gate.says() == "held"
        before = transcript.read_text().count('"sent"')
        for _ in range(signals):
            program.signal(signal.SIGINT)
            program.until(lambda: transcript.read_text().count('"sent"') > before)
        for _ in range(4):
            gate.open()
        assert program.end() == 1
    assert program.stdout == "Copy aborted\n"


@pytest.mark.parametrize("signals", [1, 2])
def test_interrupt_before_the_cut_rolls_back(
    scene: Scene, unchanged: Unchanged, signals: int
) -> None:
    transcript = scene.folder / "transcript"
    with unchanged(scene.disks.vm, scene.disks.folder):
        with Gate.before(scene.disks.vm, "job-complete") as gate:
            words = [*scene.specs, "--pivot", "--transcript", str(transcript)]
            program = scene.begin(*words, domain=str(gate.path))
            assert gate.says() == "held"
            before = transcript.read_text().count('"sent"')
            for _ in range(signals):
                program.signal(signal.SIGINT)
                program.until(lambda: transcript.read_text().count('"sent"') > before)
            gate.open()
            gate.open()
            assert program.end() == 1
        assert program.stdout == "Copy aborted\n"
        scene.disks.write(0)


def test_interrupt_after_the_first_finalize_comes_too_late(scene: Scene) -> None:
    with Gate.before(scene.disks.vm, "job-finalize") as gate:
        words = [*scene.specs, "--pivot", "--max-freeze", "60000"]
        program = scene.begin(*words, domain=str(gate.path))
        assert gate.says() == "held"
        program.signal(signal.SIGINT)
        gate.open()
        gate.open()
        assert program.end() == 0, program.stderr
    assert program.stdout == "Successfully pivoted\n"
    assert scene.disks.active == [scene.disks.copy(0), scene.disks.copy(1)]
    scene.disks.write(0x62)


@pytest.mark.parametrize("as_json", [False, True])
def test_timeout_aborts(scene: Scene, unchanged: Unchanged, *, as_json: bool) -> None:
    with unchanged(scene.disks.vm, scene.disks.folder):
        more = ["--json"] if as_json else []
        program = scene.begin(*scene.specs, "--pivot", "--timeout", "0.3", *PINNED, *more)
        assert program.end() == 5
    if as_json:
        assert program.events[-1] == {"event": "result", "outcome": "aborted", "exit": 5}
    else:
        assert program.stdout == "Copy aborted\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_one_that_fails_is_named(scene: Scene, unchanged: Unchanged, *, as_json: bool) -> None:
    disks = scene.disks
    with unchanged(disks.vm, disks.folder):
        program = scene.begin(*scene.specs, "--pivot", *PINNED, *(["--json"] if as_json else []))
        until(lambda: len(disks.copies()) == 2)
        disks.vm.execute("job-cancel", id=disks.copies()[1])
        assert program.end() == 1
    if as_json:
        assert program.events[-1].items() >= {"outcome": "failed", "exit": 1}.items()
        assert "all copies were rolled back" in program.events[-1]["message"]
    else:
        assert program.stdout.startswith("Copy failed: ")
        assert "; all copies were rolled back\n" in program.stderr


# -- quiescing ----------------------------------------------------------------------------------


FROZEN_AND_THAWED = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_quiesced(scene: Scene, agent: GuestAgent) -> None:
    path, asked = agent()
    words = [*scene.specs, "--pivot", "--quiesce", "--agent", path, "--max-freeze", "30000"]
    program = scene.begin(*words, "--json")
    assert program.end() == 0
    assert {"event": "quiesced", "filesystems": 3} in program.events
    assert asked == FROZEN_AND_THAWED


def test_no_file_system_is_worth_a_warning(scene: Scene, agent: GuestAgent) -> None:
    path, asked = agent(freeze={"return": 0})
    words = [*scene.specs, "--finish", "--quiesce", "--agent", path, "--max-freeze", "30000"]
    code, out, err = scene.run(*words)
    assert (code, out) == (0, "Successfully copied\n")
    assert "warning: the guest agent has frozen no file system\n" in err
    assert asked == FROZEN_AND_THAWED


@pytest.mark.parametrize("trouble", ["refused", "missing"])
def test_without_its_agent_nothing_is_ended(
    scene: Scene,
    unchanged: Unchanged,
    agent: GuestAgent,
    trouble: str,
) -> None:
    path, asked = agent(freeze={"error": {"class": "GenericError", "desc": "busy"}})
    if trouble == "missing":
        path += "-not-there"
    with unchanged(scene.disks.vm, scene.disks.folder):
        code, out, err = scene.run(*scene.specs, "--pivot", "--quiesce", "--agent", path)
    assert (code, out) == (4, "")
    reason = "refused guest-fsfreeze-freeze: busy" if trouble == "refused" else "No such file"
    assert reason in err
    assert err.count("\n") == 1
    assert asked == (FROZEN_AND_THAWED if trouble == "refused" else [])


def test_what_could_not_be_thawed_is_told(scene: Scene, agent: GuestAgent) -> None:
    path, asked = agent(thaw={"error": {"class": "GenericError", "desc": "stuck"}})
    words = [*scene.specs, "--pivot", "--quiesce", "--agent", path, "--max-freeze", "30000"]
    code, out, err = scene.run(*words)
    assert (code, out) == (7, "Successfully pivoted\n")
    assert "the guest's file systems may still be frozen: " in err
    assert asked == FROZEN_AND_THAWED


def test_thawed_after_an_interrupt_in_the_cut(
    scene: Scene, unchanged: Unchanged, agent: GuestAgent
) -> None:
    path, asked = agent()
    with (
        unchanged(scene.disks.vm, scene.disks.folder),
        Gate.before(scene.disks.vm, "job-complete") as gate,
    ):
        words = [*scene.specs, "--pivot", "--quiesce", "--agent", path]
        program = scene.begin(*words, domain=str(gate.path))
        assert gate.says() == "held"
        assert asked == FROZEN_AND_THAWED[:1]
        program.signal(signal.SIGINT)
        gate.open()
        gate.open()
        assert program.end() == 1
    assert program.stdout == "Copy aborted\n"
    assert asked == FROZEN_AND_THAWED
