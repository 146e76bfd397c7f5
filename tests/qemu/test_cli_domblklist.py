# SPDX-License-Identifier: MIT
"""``qmpmirror domblklist`` as a program, and what every command does when there is no QEMU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers

COMMANDS = (("domblklist",), ("blockcopy", "--path", "vda", "--dest", "/nonexistent/copy"))


@pytest.fixture(autouse=True)
def warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the program too: a file or a connection that is left open shows on its stderr."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")


def second(layers: Layers) -> Path:
    """The image of the second disk."""
    return layers.folder / "second.raw"


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    """Two disks, one of them with a name of its own, and a drive without a medium."""
    second(layers).write_bytes(bytes(1 << 20))
    return boot(
        *("-drive", f"if=virtio,format=qcow2,file={layers.snap2}"),
        *("-drive", f"if=none,id=drv1,format=raw,file={second(layers)}"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=drv1,id=dev1"),
        *("-device", "ide-cd,id=cd0"),
        name=f"list-{os.urandom(6).hex()}",
    )


def test_table_is_that_of_virsh(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblklist", vm.name)
    line = "-" * (9 + len(str(layers.snap2)) + 3)
    rows = {f" vda      {layers.snap2}", f" sda      {second(layers)}", " hda      -"}
    head, rule, *found, blank, end = ran.stdout.split("\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (head, rule, blank, end) == (" Target   Source", line, "", "")
    assert set(found) == rows


def test_details(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblklist", "--domain", vm.name, "--details")
    assert ran.returncode == 0
    assert ran.stdout.startswith(" Type   Device   Target   Source\n")
    assert f"\n file   disk     vda      {layers.snap2}\n" in ran.stdout
    assert f"\n file   disk     sda      {second(layers)}\n" in ran.stdout
    assert "\n file   cdrom    hda      -\n" in ran.stdout


def test_json_has_all_names_of_each_disk(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblklist", vm.qmp, "--json")
    *disks, result = map(json.loads, ran.stdout.splitlines())
    assert (ran.returncode, ran.stderr) == (0, "")
    assert result == {"event": "result", "outcome": "done", "exit": 0}
    assert {disk["event"] for disk in disks} == {"disk"}
    by_target = {disk["target"]: disk for disk in disks}
    assert by_target.keys() == {"vda", "sda", "hda"}
    assert by_target["sda"].items() >= {"device": "dev1", "drive": "drv1", "format": "raw"}.items()
    assert by_target["vda"].items() >= {"drive": "virtio0", "format": "qcow2"}.items()
    assert by_target["vda"]["source"] == str(layers.snap2)
    assert by_target["hda"].items() >= {"device": "cd0", "source": "", "image_node": ""}.items()


def test_mirroring_copy_shows_the_image_that_the_guest_uses(
    vm: Qemu, layers: Layers, cli: Cli
) -> None:
    copy = layers.folder / "copy.qcow2"
    before = cli("domblklist", vm.name).stdout
    assert cli("blockcopy", vm.name, "vda", copy, "--wait", "--shallow").returncode == 0
    assert cli("domblklist", vm.name).stdout == before
    (job,) = vm.execute("query-jobs")
    vm.execute("job-complete", id=job["id"])
    while vm.execute("query-jobs")[0]["status"] != "concluded":
        time.sleep(0.01)
    assert f" vda      {copy}\n" in cli("domblklist", vm.name).stdout


def test_transcript_pairs_commands_and_replies_and_shows_queries_only(
    vm: Qemu, cli: Cli, tmp_path: Path
) -> None:
    transcript = tmp_path / "transcript"
    ran = cli("domblklist", vm.name, "--transcript", transcript)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    sent = [line for line in lines if line["direction"] == "sent"]
    received = [line for line in lines if line["direction"] == "received" and "id" in line]
    assert sorted(line["id"] for line in sent) == sorted(line["id"] for line in received)
    commands = {line["message"]["execute"] for line in sent}
    assert {"query-block", "query-named-block-nodes"} <= commands
    assert not [name for name in commands if not name.startswith(("query-", "qom-get", "x-debug-"))]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_transcript_that_cannot_be_written(
    vm: Qemu, cli: Cli, command: tuple[str, ...], tmp_path: Path
) -> None:
    transcript = tmp_path / "missing" / "transcript"
    ran = cli(*command, "--domain", vm.name, "--transcript", transcript)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: transcript {transcript}: No such file or directory\n"


@pytest.fixture
def babbler(tmp_path: Path) -> Iterator[Path]:
    """A socket behind which somebody speaks, but not QMP."""
    path = tmp_path / "babbler"

    def babble() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(b"220 mail.example.org ESMTP\r\n")
            client.recv(65536)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=babble)
        thread.start()
        yield path
        thread.join()


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_what_is_no_qmp_server(
    cli: Cli, command: tuple[str, ...], babbler: Path, *, as_json: bool
) -> None:
    ran = cli(*command, "--domain", babbler, *(["--json"] if as_json else []))
    assert ran.returncode == 3
    message = f"{babbler} does not speak QMP: "
    if as_json:
        (result,) = map(json.loads, ran.stdout.splitlines())
        assert ran.stderr == ""
        assert result.items() >= {"event": "result", "exit": 3, "error": "NotQMP"}.items()
        assert result["message"].startswith(message)
    else:
        (line,) = ran.stderr.splitlines()
        assert ran.stdout == ""
        assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_nobody_there(cli: Cli, command: tuple[str, ...], tmp_path: Path, *, as_json: bool) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "socket"))
    ran = cli(*command, "--domain", tmp_path / "socket", *(["--json"] if as_json else []))
    assert ran.returncode == 3
    message = f"nobody listens on {tmp_path / 'socket'}: Connection refused"
    if as_json:
        (result,) = map(json.loads, ran.stdout.splitlines())
        assert ran.stderr == ""
        assert result.items() >= {"event": "result", "exit": 3, "error": "NotListening"}.items()
        assert result["message"] == message
    else:
        assert (ran.stdout, ran.stderr) == ("", f"error: {message}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_interrupt_while_waiting_for_the_greeting(
    tmp_path: Path, command: tuple[str, ...], number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent"))
        listener.listen()
        listener.settimeout(60)
        words: list[Any] = [*command, "--domain", tmp_path / "silent"]
        program = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "qmpmirror", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        client, _ = listener.accept()
        with client:
            program.send_signal(number)
            said = program.communicate(timeout=60)
    assert (program.returncode, *said) == (1, "", "error: interrupted\n")
