# SPDX-License-Identifier: MIT
"""``qmpmirror migrate``, and what ``recover`` and ``blockjob`` do when its process has died."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.qemu.clients import Gate
from tests.qemu.moving import make
from tests.qemu.program import DEADLINE, until
from tests.qemu.servers import certificates, needs_openssl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.qemu.conftest import Boot, Cli, Layers
    from tests.qemu.moving import Pair

ALL = "--copy-storage-all"


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the folders of the sockets go; none may be left."""
    folder = Path(tempfile.mkdtemp(prefix="qm-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert not list(folder.iterdir())
    shutil.rmtree(folder)


def test_it_prints_what_has_happened(boot: Boot, layers: Layers, cli: Cli, tmp_path: Path) -> None:
    pair = make(boot, layers, disks=2)
    words = [pair.source.name, pair.destination.name, ALL, "--live", "--verbose"]
    run = cli("migrate", *words, "--transcript", tmp_path / "seen")
    assert (run.returncode, run.stdout) == (0, "Migration complete\n"), run.stderr
    assert re.search(r"^Migration: \[ ?\d+\.\d\d %\]", run.stderr)
    assert "Migration: [100.00 %]" in run.stderr
    assert "the guest runs at the destination, on " in run.stderr
    pair.check_moved()
    assert '"migrate-continue"' in (tmp_path / "seen").read_text()
    assert '"migrate-incoming"' in (tmp_path / "seen.destination").read_text()


@needs_openssl
def test_json_and_all_that_can_be_asked(
    boot: Boot, layers: Layers, cli: Cli, tmp_path: Path
) -> None:
    certificates(tmp_path / "pki")
    pair = make(boot, layers, incremental=True, disks=2)
    run = cli(
        *("migrate", "--desturi", pair.destination.qmp, "--domain", pair.source.sockets[1]),
        *("--copy-storage-inc", "--copy-storage-synchronous-writes"),
        *("--migrate-disks", "vda,vd1", "--tls", tmp_path / "pki", "--bandwidth", "64"),
        *("--timeout", "60", "--timeout-suspend", "--json"),
    )
    *progress, result = map(json.loads, run.stdout.splitlines())
    assert {each["event"] for each in progress} == {"progress"}
    assert [each["phase"] for each in progress][-1] == "done"
    assert (result["outcome"], result["exit"]) == ("migrated", 0)
    assert result["disks"] == ["vda", "vdb"]
    assert result["images"] == list(map(str, pair.images))
    pair.source.execute("migrate-set-parameters", {"max-bandwidth": 2**27})
    pair.check_moved()


def test_usage(cli: Cli) -> None:
    for words, why in (
        ("a b", "--copy-storage-inc is required"),
        (f"a b {ALL} --copy-storage-inc", "not allowed with"),
        (f"a {ALL}", "--desturi is missing"),
        (f"a b {ALL} --bandwidth x", "is no number"),
        (f"a b {ALL} --timeout 0", "no positive number"),
    ):
        run = cli("migrate", *words.split())
        assert (run.returncode, run.stdout) == (2, "")
        assert why in run.stderr


def test_refusals_and_failures(boot: Boot, layers: Layers, cli: Cli) -> None:
    pair = make(boot, layers, destination={"machine": "q35"})
    run = cli("migrate", pair.source.name, pair.source.name, ALL)
    assert (run.returncode, run.stdout) == (4, "")
    assert "the destination does not wait for a migration" in run.stderr
    run = cli("migrate", pair.source.name, pair.destination.name, "--copy-storage-inc")
    assert (run.returncode, run.stdout) == (4, "")
    assert "has no backing file" in run.stderr
    run = cli("migrate", pair.source.name, pair.destination.name, ALL, "--json")
    *_, result = map(json.loads, run.stdout.splitlines())
    assert (run.returncode, result["outcome"], result["runs_on"]) == (1, "failed", "source")
    pair.check_stayed()
    run = cli("migrate", pair.source.name, pair.destination.name, ALL)
    assert run.returncode == 3


@attrs.define
class Client:
    """A qmpmirror process that is held back before it sends a command to one of both."""

    process: subprocess.Popen[str]
    gate: Gate

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    """Ends the processes, and lets go of what was held back."""
    with contextlib.ExitStack() as stack:
        yield stack


def begin(
    stack: contextlib.ExitStack, pair: Pair, folder: Path, where: str, command: str, *words: str
) -> Client:
    """Begin a migration, and wait until it is about to send a command to one of both."""
    vm = getattr(pair, where)
    gate = Gate(folder / "gate", vm.qmp, lambda _, name: name == command)
    stack.enter_context(gate())
    sockets = {"source": pair.source.qmp, "destination": pair.destination.qmp, where: gate.path}
    line = [sys.executable, "-W", "error", "-m", "qmpmirror", "migrate"]
    process = subprocess.Popen(
        [*line, str(sockets["source"]), str(sockets["destination"]), ALL, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    until(lambda: gate.held.is_set() or process.poll() is not None)
    assert gate.held.is_set(), process.communicate()
    return Client(process, gate)


BEFORE = [
    ("destination", "blockdev-add"),
    ("destination", "nbd-server-start"),
    ("destination", "block-export-add"),
    ("source", "blockdev-add"),
    ("source", "blockdev-mirror"),
    ("destination", "migrate-set-capabilities"),
    ("destination", "migrate-incoming"),
    ("source", "migrate-set-capabilities"),
    ("source", "migrate"),
    ("source", "block-job-cancel"),
    ("source", "blockdev-del"),
    ("source", "migrate-continue"),
]
"""The commands before the switch."""


@pytest.mark.parametrize(("where", "command"), BEFORE)
def test_recover_before_the_switch(
    boot: Boot,
    layers: Layers,
    cli: Cli,
    tmp_path: Path,
    sockets: Path,
    held: contextlib.ExitStack,
    where: str,
    command: str,
) -> None:
    pair = make(boot, layers, disks=2)
    begin(held, pair, tmp_path, where, command).kill()
    if BEFORE.index((where, command)) == 0:  # no QEMU knows anything yet
        (folder,) = sockets.iterdir()
        folder.rmdir()
    for vm in (pair.source, pair.destination):
        if vm.running:
            dry = cli("recover", vm.sockets[1], "--dry-run")
            assert dry.returncode == 0, dry.stderr
    run = cli("recover", pair.source.sockets[1])
    assert run.returncode == 0, run.stderr
    assert f"vda: the guest runs on {layers.snap2}\n" in run.stdout
    until(lambda: not pair.destination.running or is_calm(pair))
    if pair.destination.running:
        run = cli("recover", pair.destination.sockets[1])
        assert run.returncode == 0, run.stderr
        assert "the guest runs on" not in run.stdout
        assert cli("recover", pair.destination.sockets[1]).stdout == "Nothing to recover\n"
    assert cli("recover", pair.source.sockets[1]).stdout.startswith("Nothing to recover\n")
    pair.check_stayed()


def is_calm(pair: Pair) -> bool:
    """Whether the destination does not end because its stream has broken off."""
    status = pair.destination.execute("query-migrate").get("status", "")
    return status in {"", "setup", "none"}


AFTER = [
    ("source", "job-dismiss"),
    ("destination", "block-export-del"),
    ("destination", "nbd-server-stop"),
    ("destination", "cont"),
    ("destination", "blockdev-del"),
]


@pytest.mark.parametrize("way", ["--finish", "--undo"])
@pytest.mark.parametrize(("where", "command"), AFTER)
def test_recover_after_the_switch(
    boot: Boot,
    layers: Layers,
    cli: Cli,
    tmp_path: Path,
    held: contextlib.ExitStack,
    where: str,
    command: str,
    way: str,
) -> None:
    pair = make(boot, layers, disks=2)
    begin(held, pair, tmp_path, where, command).kill()
    run = cli("recover", pair.source.sockets[1])
    if command == "job-dismiss":
        told = "put away: the guest has gone to the destination\n"
        assert run.stdout.count(told) == 2
    assert (run.returncode, "the guest runs on" in run.stdout) == (0, False), run.stderr
    if command == "blockdev-del":
        assert "migration, ending: put away\n" in cli("recover", pair.destination.sockets[1]).stdout
        pair.check_moved()
        return
    for _ in range(2):
        run = cli("recover", pair.destination.sockets[1])
        assert "the guest has arrived and is paused" in run.stdout
        assert pair.destination.execute("query-status")["status"] == "paused"
    run = cli("recover", pair.destination.sockets[1], way)
    assert run.returncode == 0, run.stderr
    assert ("the guest runs here now" in run.stdout) is (way == "--finish")
    assert cli("recover", pair.destination.sockets[1]).stdout.startswith("Nothing to recover\n")
    pair.check_moved(running=way == "--finish")


@pytest.mark.parametrize("command", ["blockdev-mirror", "migrate", "block-job-cancel"])
def test_ctrl_c(
    boot: Boot,
    layers: Layers,
    tmp_path: Path,
    held: contextlib.ExitStack,
    command: str,
) -> None:
    pair = make(boot, layers, disks=2)
    client = begin(held, pair, tmp_path, "source", command)
    client.process.send_signal(signal.SIGINT)
    client.gate.opened.set()
    stdout, stderr = client.process.communicate(timeout=DEADLINE)
    assert (client.process.returncode, stdout) == (1, "Migration aborted\n"), stderr
    assert "the guest is at the source, as before" in stderr
    pair.check_stayed()


def test_ctrl_c_that_comes_too_late(
    boot: Boot, layers: Layers, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    pair = make(boot, layers)
    client = begin(held, pair, tmp_path, "destination", "block-export-del")
    client.process.send_signal(signal.SIGINT)
    client.gate.opened.set()
    stdout, stderr = client.process.communicate(timeout=DEADLINE)
    assert (client.process.returncode, stdout) == (0, "Migration complete\n"), stderr
    pair.check_moved()


def test_blockjob_on_a_mirror_of_a_migration(
    boot: Boot, layers: Layers, cli: Cli, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    pair = make(boot, layers)
    client = begin(held, pair, tmp_path, "destination", "migrate-set-capabilities")
    client.kill()
    job = pair.source.sockets[1]
    assert cli("blockjob", job, "vda").stdout == "Block Copy: [100.00 %] mirroring\n"
    for words in (["--pivot"], ["--synchronous-writes"]):
        run = cli("blockjob", job, "vda", *words)
        assert (run.returncode, run.stdout) == (4, "")
        assert "belongs to a migration, which alone may end it" in run.stderr
    run = cli("blockcopy", job, "vda", layers.folder / "copy")
    assert run.returncode == 4
    assert "has block job" in run.stderr or "already" in run.stderr
    doctor = cli("doctor", job)
    assert "no backing node" not in doctor.stdout
    assert cli("blockjob", job, "vda", "--abort").stdout == "Job aborted\n"
    for vm in (pair.source, pair.destination):
        assert cli("recover", vm.sockets[1]).returncode == 0
    pair.check_stayed()


def test_a_suspended_guest_whose_client_dies(
    boot: Boot, layers: Layers, cli: Cli, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    pair = make(boot, layers, disks=2)
    options = ("--timeout", "0.000001")
    client = begin(held, pair, tmp_path, "source", "migrate-continue", *options)
    assert pair.source.execute("query-status")["status"] == "finish-migrate"
    client.kill()
    assert cli("recover", pair.source.sockets[1]).returncode == 0
    pair.destination.stop()
    pair.check_stayed()
