# SPDX-License-Identifier: MIT
"""The command line as far as it goes without a QEMU."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import errors
from qmpmirror.cli import COMMANDS, main
from qmpmirror.cli.exits import Exit, exit_code
from qmpmirror.cli.render import Output
from qmpmirror.cli.run import Interrupts, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Capture = pytest.CaptureFixture[str]


def status(*words: str) -> int:
    """The exit status of a command line, however it ends."""
    try:
        return int(main(words))
    except SystemExit as exiting:
        return int(exiting.code or 0)


# --- before any command runs -----------------------------------------------------------------


def test_version(capsys: Capture) -> None:
    assert status("--version") == 0
    assert capsys.readouterr() == (f"qmpmirror {qmpmirror.__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help(capsys: Capture, words: list[str]) -> None:
    assert status(*words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: qmpmirror [--version] [--help] COMMAND ...\n")
    for command, (_, summary) in COMMANDS.items():
        assert f"  {command} " in out
        assert summary in out
    assert max(map(len, out.splitlines())) <= 100


def test_no_command_at_all(capsys: Capture) -> None:
    assert status() == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "usage: qmpmirror [--version] [--help] COMMAND ...")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("blockcpy", "unknown command 'blockcpy': did you mean blockcopy?"),
        ("block-copy", "unknown command 'block-copy': did you mean blockcopy?"),
        ("domblkls", "unknown command 'domblkls': did you mean domblklist?"),
        ("frobnicate", "unknown command 'frobnicate': see qmpmirror --help"),
        ("", "unknown command '': see qmpmirror --help"),
        ("--verbose", "unknown command '--verbose': see qmpmirror --help"),
    ],
)
def test_an_unknown_command(capsys: Capture, command: str, sentence: str) -> None:
    assert status(command, "testvm") == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command(capsys: Capture, command: str) -> None:
    assert status(command, "--help") == 0
    asked = capsys.readouterr().out
    assert status("help", command) == 0
    assert capsys.readouterr().out == asked
    assert asked.startswith(f"usage: qmpmirror {command} ")
    assert f"\nexample:\n  qmpmirror {command}" in asked


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_every_command_works(command: str) -> None:
    parser = import_module(f"qmpmirror.cli.{COMMANDS[command][0]}").parser()
    _, line = parser.epilog.splitlines()
    program, word, *words = shlex.split(line)
    assert (program, word) == ("qmpmirror", command)
    parser.parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "blockcopy testvm vda /export/copy.qcow2",
        "blockcopy --domain testvm vda /export/copy --wait --verbose --shallow --pivot --finish",
        "blockcopy testvm vda --dest /x --format raw --timeout 60 --async --transient-job",
        "blockcopy testvm vda /x 100 --bytes --granularity 65536 --buf-size 1048576 --raw",
        "blockjob testvm vda",
        "blockjob testvm vda --abort",
        "blockjob testvm --path vda --pivot",
        "blockjob testvm vda --raw --bytes",
        "blockjob testvm vda --bandwidth 100",
        "domblklist testvm --details",
        "domblkinfo testvm vda",
        "domblkinfo testvm --all --human",
        "domblkstat testvm vda --human",
        "domblkstat testvm",
    ],
)
def test_virsh_s_lines_are_understood(line: str) -> None:
    command, *words = shlex.split(line)
    parser = import_module(f"qmpmirror.cli.{COMMANDS[command][0]}").parser()
    assert parser.parse(words).domain == "testvm"


HEAVY = {"asyncio", "qemu.qmp", "qemu"}


@pytest.mark.parametrize(
    "line", ["--help", "--version", "nonsense", *(f"{c} --help" for c in COMMANDS)]
)
def test_what_only_prints_loads_little(line: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qmpmirror", *line.split()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    times = [row for row in ran.stderr.splitlines() if row.startswith("import time:")]
    loaded = {row.rpartition("|")[2].strip() for row in times}
    assert {"qmpmirror", "qmpmirror.cli"} <= loaded
    assert not loaded & HEAVY
    assert ran.returncode == (2 if line == "nonsense" else 0)


# --- usage -----------------------------------------------------------------------------------

COPY = ["blockcopy", "/nowhere/qmp.sock", "vda", "/x"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bandwidth", "-1"], "bandwidth '-1' is out of range: give 0 (no limit) to 7E"),
        (["--bandwidth", "fast"], "bandwidth 'fast' is no number with a suffix such as k, M, G"),
        (["0.5"], "bandwidth '0.5' is no number with a suffix such as k, M, G"),
        (["--granularity", "x"], "granularity 'x' is no number with a suffix such as k, M, G"),
        (
            ["--granularity", "1000"],
            "granularity 1000 bytes is not a power of two from 512 to 64 MiB",
        ),
        (["--buf-size", "x"], "buf-size 'x' is no number with a suffix such as k, M, G"),
        (["--raw", "--format", "qcow2"], "--raw and --format are mutually exclusive"),
        (["--timeout", "0"], "argument --timeout: '0' is no positive number of seconds"),
        (
            ["--verbose"],
            "--verbose requires at least one of --timeout, --wait, --pivot, or --finish",
        ),
        (["--async"], "--async requires at least one of --timeout, --wait, --pivot, or --finish"),
        (["1", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_a_copy_that_makes_no_sense(capsys: Capture, words: list[str], sentence: str) -> None:
    assert status(*COPY, *words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {sentence} (see qmpmirror blockcopy --help)\n")


# --- exit codes ------------------------------------------------------------------------------

CODES: dict[type[errors.Error], Exit] = {
    errors.Error: Exit.FAILED,
    errors.UsageError: Exit.USAGE,
    errors.ConnectError: Exit.NO_CONNECTION,
    errors.NoSuchMonitor: Exit.NO_CONNECTION,
    errors.NotListening: Exit.NO_CONNECTION,
    errors.NotQMP: Exit.NO_CONNECTION,
    errors.MonitorBusy: Exit.NO_CONNECTION,
    errors.AmbiguousDomain: Exit.NO_CONNECTION,
    errors.ConnectionLost: Exit.LOST,
    errors.DeadlineExceeded: Exit.DEADLINE,
    errors.CommandTimeout: Exit.DEADLINE,
    errors.Stalled: Exit.DEADLINE,
    errors.Refused: Exit.REFUSED,
    errors.CommandFailed: Exit.REFUSED,
    errors.Unsupported: Exit.REFUSED,
    errors.DiskError: Exit.REFUSED,
    errors.DiskNotFound: Exit.REFUSED,
    errors.AmbiguousDisk: Exit.REFUSED,
    errors.EmptyDrive: Exit.REFUSED,
    errors.DiskBusy: Exit.REFUSED,
    errors.DestinationError: Exit.REFUSED,
    errors.DestinationExists: Exit.REFUSED,
    errors.JobError: Exit.FAILED,
    errors.NotReady: Exit.REFUSED,
    errors.EndingAlreadyAsked: Exit.REFUSED,
    errors.JobNotFound: Exit.REFUSED,
    errors.JobFailed: Exit.FAILED,
    errors.MigrationFailed: Exit.FAILED,
}


def descendants(base: type[errors.Error]) -> Iterator[type[errors.Error]]:
    yield base
    for child in base.__subclasses__():
        yield from descendants(child)


def test_every_error_has_a_code() -> None:
    """A new class of error must be entered above: nobody has thought of its code yet."""
    assert set(CODES) == set(descendants(errors.Error))


def bare(kind: type[errors.Error]) -> errors.Error:
    """An error without what its own constructor wants to know."""
    error = kind.__new__(kind, "what")
    errors.Error.__init__(error, "what", hint="advice")
    return error


@pytest.mark.parametrize("kind", CODES)
def test_the_code_of_every_error(capsys: Capture, kind: type[errors.Error]) -> None:
    error = bare(kind)
    error.left = ("node a: busy",)

    async def fails(_: Interrupts) -> int:
        raise error

    assert exit_code(error) is CODES[kind]
    assert run(fails, Output(as_json=False)) == CODES[kind]
    text = "error: what (advice)\nerror: could not be cleaned up: node a: busy\n"
    assert capsys.readouterr() == ("", text)
    assert run(fails, Output(as_json=True)) == CODES[kind]
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "event": "result",
        "outcome": "error",
        "exit": int(CODES[kind]),
        "error": kind.__name__,
        "message": "what",
        "hint": "advice",
        "left": ["node a: busy"],
    }


def test_what_the_codes_are() -> None:
    assert [(code.name, int(code)) for code in Exit] == [
        ("DONE", 0),
        ("FAILED", 1),
        ("USAGE", 2),
        ("NO_CONNECTION", 3),
        ("REFUSED", 4),
        ("DEADLINE", 5),
        ("LOST", 6),
        ("NOT_CLEAN", 7),
    ]


@pytest.mark.parametrize(
    ("domain", "code", "sentence"),
    [
        ("", 2, "the domain is empty: give a QMP socket, HOST:PORT, a name or a pid"),
        ("unix:", 2, "domain 'unix:' names no socket: write unix:PATH"),
        ("host:0", 2, "domain 'host:0' is not HOST:PORT with a port from 1 to 65535"),
        ("/nowhere/qmp.sock", 3, "/nowhere/qmp.sock: No such file or directory"),
        ("/", 3, "/ is not a socket"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["domblklist", "--domain"], ["blockcopy", "--path", "vda", "--dest", "/x", "--domain"]],
)
def test_a_domain_that_cannot_be_reached(
    capsys: Capture, command: list[str], *, domain: str, code: int, sentence: str
) -> None:
    assert status(*command, domain) == code
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert status(*command, domain, "--json") == code
    out, err = capsys.readouterr()
    result: dict[str, Any] = json.loads(out)
    assert (err, result["exit"], result["message"]) == ("", code, sentence)


def test_nobody_listens(capsys: Capture, tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
    assert status("domblklist", path) == 3
    text = f"error: nobody listens on {path}: Connection refused\n"
    assert capsys.readouterr() == ("", text)


def test_a_transcript_that_cannot_be_written(capsys: Capture, tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert status("domblklist", path, "--transcript", str(tmp_path / "no" / "file")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "No such file or directory" in err


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_is_waited_for(capsys: Capture, number: signal.Signals) -> None:
    cleaned_up = []

    async def wait() -> int:
        signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        finally:
            cleaned_up.append(True)
        return 0

    assert run(lambda interrupts: interrupts.guard(wait()), Output(as_json=False)) == 1
    assert cleaned_up
    assert capsys.readouterr() == ("", "error: interrupted\n")
    assert run(lambda interrupts: interrupts.guard(wait()), Output(as_json=True)) == 1
    result = json.loads(capsys.readouterr().out)
    assert result == {"event": "result", "outcome": "interrupted", "exit": 1}


def test_a_command_that_comes_to_its_end(capsys: Capture) -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert run(lambda interrupts: interrupts.guard(work()), Output(as_json=False)) == 7
    assert capsys.readouterr() == ("", "")
