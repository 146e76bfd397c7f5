# SPDX-License-Identifier: MIT
"""Small things that a command line owes its user."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qmpmirror
from qmpmirror import disks
from qmpmirror.disks import Disk

CSI = "\x1b["


def disk(number: str) -> Disk:
    return Disk("", "", f"data{number}", f"/machine/x/{number}", f"vd{number}", None, "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dataaa", "did you mean dataa?"), ("sdb", "did you mean vdb?"), ("nonsense", "")],
)
def test_a_mistaken_disk(name: str, hint: str) -> None:
    with pytest.raises(qmpmirror.DiskNotFound) as caught:
        disks.find([disk("a"), disk("b")], name)
    assert caught.value.hint == hint


def test_there_is_no_colour_to_switch_off() -> None:
    """So NO_COLOR has nothing to do: only the progress line erases what was there before."""
    escapes = []
    for path in Path(qmpmirror.__file__).parent.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            escapes += re.findall(r"\\(?:x1b|033|e)\[[0-9;]*[A-Za-z]", line)
    assert escapes == [r"\x1b[K"]


@pytest.mark.parametrize("line", ["--help", "blockcopy --help", "list", "nonsense", "domblklist x"])
def test_a_terminal_gets_plain_text(line: str) -> None:
    """Python 3.14's argparse would have colours of its own."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qmpmirror", *line.split()],
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "FORCE_COLOR": "1"},
    )
    os.close(end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    process.wait(60)
    os.close(terminal)
    assert shown
    assert CSI not in shown.decode()
