# SPDX-License-Identifier: MIT
"""What people and programs get to see: virsh's own formats."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qmpmirror.cli import render
from qmpmirror.cli.render import Output, human_size, table
from qmpmirror.life import Phase
from qmpmirror.operations.handle import Pace, Progress

GIB = 1 << 30
MIB = 1 << 20


Capture = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    """What goes to stderr, which is a terminal; ``out`` is what goes to stdout."""

    def __init__(self) -> None:
        super().__init__()
        self.out = io.StringIO()

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    # Not sys.stderr itself: that is pytest's, which puts its own back for the test.
    monkeypatch.setattr(render, "sys", SimpleNamespace(stderr=made, stdout=made.out))
    return made


def progress(
    offset: int = 0,
    length: int = 100 * MIB,
    rate: float = 0,
    eta: float | None = None,
    phase: Phase = Phase.COPYING,
) -> Progress:
    return Progress(phase, offset, length, rate, eta)


# --- tables ----------------------------------------------------------------------------------


def test_virsh_s_table() -> None:
    """As virsh prints it for the same disks."""
    expected = """\
 Target   Source
-------------------------------------------------------------------
 vda      /var/lib/libvirt/images/ubuntu-server-2004.qcow2
 sda      /var/lib/libvirt/boot/ubuntu-server-2004-cloud-init.iso"""
    rows = [
        ("vda", "/var/lib/libvirt/images/ubuntu-server-2004.qcow2"),
        ("sda", "/var/lib/libvirt/boot/ubuntu-server-2004-cloud-init.iso"),
    ]
    assert table(("Target", "Source"), rows) == expected


def test_virsh_s_detailed_table() -> None:
    expected = """\
 Type   Device   Target   Source
------------------------------------
 file   disk     vda      /a.qcow2
 file   cdrom    hdc      -"""
    rows = [("file", "disk", "vda", "/a.qcow2"), ("file", "cdrom", "hdc", "-")]
    assert table(("Type", "Device", "Target", "Source"), rows) == expected


def test_a_table_without_rows() -> None:
    assert table(("Target", "Source"), []) == " Target   Source\n------------------"


def test_a_column_is_as_wide_as_its_widest_cell() -> None:
    text = table(("Id", "Name"), [("1", "a"), ("12345", "b")])
    assert text.splitlines() == [
        " Id      Name",
        "---------------",
        " 1       a",
        " 12345   b",
    ]


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1023.7, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (100 * MIB, "100.0 MiB"),
        (1023.9 * MIB, "1023.9 MiB"),
        (GIB - 1, "1.0 GiB"),
        (2.5 * GIB, "2.5 GiB"),
        (1024 * GIB, "1.0 TiB"),
        (5000 * 1024 * GIB, "5000.0 TiB"),
    ],
)
def test_sizes_for_people(number: float, text: str) -> None:
    assert human_size(number) == text


# --- progress --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (progress(0, 0), "[ 0.00 %]"),
        (progress(), "[ 0.00 %] 0 B of 100.0 MiB"),
        (progress(25 * MIB), "[25.00 %] 25.0 MiB of 100.0 MiB"),
        (progress(100 * MIB), "[99.99 %] 100.0 MiB of 100.0 MiB"),
        (progress(99999 * MIB, 100000 * MIB), "[99.99 %] 97.7 GiB of 97.7 GiB"),
        (progress(MIB, 3 * MIB), "[33.33 %] 1.0 MiB of 3.0 MiB"),
        (progress(2 * MIB, 3 * MIB), "[66.66 %] 2.0 MiB of 3.0 MiB"),
        (
            progress(25 * MIB, rate=5 * MIB, eta=15.2),
            "[25.00 %] 25.0 MiB of 100.0 MiB, 5.0 MiB/s, 0:15 left",
        ),
        (
            progress(MIB, rate=1, eta=3599.6),
            "[ 1.00 %] 1.0 MiB of 100.0 MiB, 1 B/s, 60:00 left",
        ),
        (progress(0, 0, phase=Phase.MIRRORING), "[100.00 %]"),
        (progress(MIB, MIB, phase=Phase.MIRRORING), "[100.00 %] 1.0 MiB of 1.0 MiB"),
    ],
)
def test_the_progress_line(terminal: Terminal, given: Progress, line: str) -> None:
    output = Output(as_json=False, label="Block Copy")
    output.progress(given)
    assert terminal.getvalue() == f"\rBlock Copy: {line}\x1b[K"
    assert terminal.out.getvalue() == ""


def test_the_line_is_drawn_over_and_then_left(terminal: Terminal) -> None:
    output = Output(as_json=False, label="Block Copy")
    output.progress(progress(0, 0))
    output.progress(progress(0, 0, phase=Phase.MIRRORING))
    output.note("done")
    output.note("really")
    drawn = "\rBlock Copy: [ 0.00 %]\x1b[K\rBlock Copy: [100.00 %]\x1b[K"
    assert terminal.getvalue() == f"{drawn}\ndone\nreally\n"


@pytest.mark.parametrize("way", ["say", "note", "error", "end_line"])
def test_messages_never_stand_in_the_progress_line(terminal: Terminal, way: str) -> None:
    output = Output(as_json=False, label="Block Copy")
    output.progress(progress(0, 0))
    if way == "end_line":
        output.end_line()
    else:
        getattr(output, way)("message")
    line, rest = terminal.getvalue().split("\x1b[K")
    assert line == "\rBlock Copy: [ 0.00 %]"
    after = {"note": "\nmessage\n", "error": "\nerror: message\n"}.get(way, "\n")
    assert rest == after
    assert terminal.out.getvalue() == ("message\n" if way == "say" else "")


def test_elsewhere_plain_lines_come_now_and_then(capsys: Capture) -> None:
    output = Output(as_json=False, label="Block Copy")
    for offset in range(50):
        output.progress(progress(offset * MIB))
    for _ in range(3):
        output.progress(progress(100 * MIB, phase=Phase.MIRRORING))
    output.say("Now in mirroring phase")
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "Block Copy: [ 0.00 %] 0 B of 100.0 MiB",
        "Block Copy: [100.00 %] 100.0 MiB of 100.0 MiB",
    ]
    assert out == "Now in mirroring phase\n"


def test_a_plain_line_comes_again_after_a_while(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(as_json=False, label="Block Copy")
    for now in (100.0, 105.0, 109.9, 110.0, 119.0, 121.0):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        output.progress(progress(int(now) * 1024))
    assert [line.split()[5] for line in capsys.readouterr().err.splitlines()] == [
        "100.0",
        "110.0",
        "121.0",
    ]


def test_the_first_burst_says_nothing_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job copies 16 MiB before any limit holds, and is looked at a moment later."""
    pace, rates = Pace(), []
    for now, offset in ((0.0, 16 * MIB), (0.5, 17 * MIB), (1.0, 18 * MIB)):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        rates.append(pace.at(offset, 100 * MIB))
    assert rates == [(0.0, None), (2 * MIB, 41.5), (2 * MIB, 41.0)]


# --- streams ---------------------------------------------------------------------------------


def test_which_stream_a_message_goes_to(capsys: Capture) -> None:
    output = Output(as_json=False)
    output.say("Successfully pivoted")
    output.note("the guest runs on /x")
    output.error("no such disk")
    output.event("result", outcome="pivoted")
    out, err = capsys.readouterr()
    assert out == "Successfully pivoted\n"
    assert err == "the guest runs on /x\nerror: no such disk\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_away_stops_nothing(stream: str) -> None:
    """``qmpmirror ... | head -1`` must not leave a copy half way."""
    script = """if True:
        from qmpmirror.cli.render import Output
        for as_json in (False, True):
            output = Output(as_json=as_json)
            for _ in range(3):
                output.say("message")
                output.error("message")
                output.event("event")
    """
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-c", script],
        stdout=writer if stream == "stdout" else subprocess.PIPE,
        stderr=writer if stream == "stderr" else subprocess.PIPE,
        check=False,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert ran.returncode == 0
    found: tuple[object, object] = ran.stdout, ran.stderr
    if stream == "stdout":
        assert found == (None, 3 * "error: message\n")
    else:
        assert found == (3 * "message\n" + 3 * '{"event": "event"}\n', None)


def test_with_json_there_is_nothing_else(capsys: Capture) -> None:
    output = Output(as_json=True, label="Block Copy")
    output.say("Successfully pivoted")
    output.note("the guest runs on /x")
    output.error("no such disk")
    output.progress(progress(MIB))
    output.event("progress", offset=1, rate=None)
    output.event("result", outcome="pivoted", path="/x\n\u00e4\udcff")
    out, err = capsys.readouterr()
    assert err == ""
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "progress", "offset": 1, "rate": None},
        {"event": "result", "outcome": "pivoted", "path": "/x\n\u00e4\udcff"},
    ]


def test_json_has_plain_numbers() -> None:
    fields = progress(MIB, rate=1.6, eta=2.5).fields()
    assert json.loads(json.dumps(fields)) == {
        "phase": "copying",
        "offset": MIB,
        "length": 100 * MIB,
        "rate": 2,
        "eta": 2.5,
        "percent": 1.0,
        "io_status": "ok",
    }
