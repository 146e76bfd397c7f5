# SPDX-License-Identifier: MIT
"""The code blocks of a page, and how they are run.

A fenced block of ``console`` or ``python`` is run, in the order of the page, in a sandbox in which
``/vm``, ``/export`` and ``testvm`` stand for folders and a name of its own. A comment before it
says otherwise::

    <!-- test: skip: why -->   it is not run
    <!-- test: exit 3 -->      the last command of the block ends with this exit code
    <!-- test: pytest -->      it is a test file
    <!-- test: with vm -->     it is inside of ``async with qmpmirror.connect(...) as vm``
    <!-- test: scene -->       (no block) the usual machine is started afresh: a chain of three
    <!-- test: two disks -->   (no block) the same, with a second disk

In what a command prints, any number may stand for any other, ``...`` for the rest of a line, or on
a line of its own for any lines. Progress is not compared.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = frozenset({"console", "python"})
_FENCE = re.compile(
    r"(?:^<!-- test: (?P<how>(?!scene|two disks)[^>]*?) -->\n+)?"
    r"^```(?P<language>[\w-]+)\n(?P<text>.*?)^```$"
    r"|^<!-- test: (?P<alone>scene|two disks) -->$",
    re.MULTILINE | re.DOTALL,
)
_PLACES = re.compile(r"(?<![\w./])/(vm|export|b)(?=[/\s\"',]|$)")
_NUMBER = re.compile(r"\d+(?:\\\.\d+)?")
_RULE = re.compile(r"^(?:\\-)+$")
_PROGRESS = re.compile(r"^(?:Block \w+|Migration): \[.*\n?", re.MULTILINE)
_SCENE = """
qemu-img create -q -f qcow2 /vm/base.qcow2 16M
qemu-io -c 'write -q -P 1 0 1M' /vm/base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 /vm/snap1.qcow2
qemu-img create -q -f qcow2 -b snap1.qcow2 -F qcow2 /vm/snap2.qcow2
qemu-io -c 'write -q -P 2 4M 1M' /vm/snap2.qcow2
qemu-img create -q -f qcow2 /vm/data.qcow2 16M
qemu-system-x86_64 -name testvm -machine pc -nodefaults -accel tcg -display none \
    -daemonize -pidfile /vm/pid -qmp unix:/vm/qmp.sock,server=on,wait=off \
    -drive file=/vm/snap2.qcow2,format=qcow2,if=virtio {}
"""
_SECOND_DISK = "-drive file=/vm/data.qcow2,format=qcow2,if=virtio"

_WITH_VM = """
import asyncio
import qmpmirror
from qmpmirror import *

async def main():
    async with qmpmirror.connect("/vm/qmp.sock") as vm:
{}

asyncio.run(main())
"""


@attrs.frozen
class Block:
    """A block of a page.

    Attributes:
        language: such as ``console``; ``scene`` where the machine is started.
        text: what is in it.
        how: what the comment before it says.
        line: where it is.
    """

    language: str
    text: str
    how: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that have to be run."""
    for match in _FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 1
        if match["alone"]:
            yield Block("scene", "", match["alone"], line)
        elif match["language"] in RUN and not (match["how"] or "").startswith("skip: "):
            yield Block(match["language"], match["text"], match["how"] or "", line)


@attrs.frozen
class Sandbox:
    """Where the blocks of a page are run.

    Attributes:
        folder: its folder; short, since sockets are in it.
        qemu: the QEMU to use.
        name: what ``testvm`` stands for.
    """

    folder: Path
    qemu: str
    name: str

    def prepare(self) -> None:
        """Make the folders, and the programs that the pages use."""
        for name in ("vm", "export", "b", "bin"):
            (self.folder / name).mkdir()
        programs = {
            "qmpmirror": f"{sys.executable} -W error -m qmpmirror",
            "python3": sys.executable,
            "qemu-system-x86_64": self.qemu,
            "qemu-img": sibling(self.qemu, "qemu-img"),
            "qemu-io": sibling(self.qemu, "qemu-io"),
        }
        for name, command in programs.items():
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            path.chmod(0o755)

    def run(self, block: Block) -> None:
        """Run a block; fails unless all went as the page says."""
        if block.language == "scene":
            self.end()
            for path in (*self.folder.glob("vm/*"), *self.folder.glob("export/*")):
                path.unlink()
            second = _SECOND_DISK if block.how == "two disks" else ""
            self._shell("set -e" + _SCENE.format(second), 0)
        elif block.language == "console":
            self._console(block)
        elif block.how == "pytest":
            (self.folder / "test_page.py").write_text(self._inside(block.text))
            options = "-q -W error -p no:cacheprovider -p no:asyncio"
            self._shell(f"python3 -m pytest {options} --qemu={self.qemu} .", 0)
        else:
            text = block.text
            if block.how == "with vm":
                text = _WITH_VM.format(textwrap.indent(text, " " * 8))
            (self.folder / "block.py").write_text(self._inside(text))
            self._python("block.py")

    def end(self) -> None:
        """Kill the QEMUs that were started here."""
        for path in self.folder.glob("vm/*pid"):
            pid = int(path.read_text())
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.folder) in words:
                os.kill(pid, signal.SIGKILL)
                while not discover.has_ended(pid):
                    time.sleep(0.01)

    def _console(self, block: Block) -> None:
        code = int(block.how.removeprefix("exit ") or 0)
        *others, last = _commands(block.text)
        for command, expected in others:
            _compare(command, self._shell(command, 0), expected)
        _compare(last[0], self._shell(last[0], code), last[1])

    def _shell(self, command: str, code: int) -> str:
        ran = subprocess.run(
            ["/bin/bash", "-c", self._inside(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=100,
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
        )
        assert ran.returncode == code, f"$ {command}\n{ran.stdout}"
        return ran.stdout.replace(f"{self.folder}/", "/").replace(self.name, "testvm")

    def _python(self, program: str) -> None:
        told = self._shell(f"python3 -W error {program}", 0)
        assert "Traceback" not in told

    def _inside(self, text: str) -> str:
        placed = _PLACES.sub(lambda match: f"{self.folder}/{match[1]}", text)
        return placed.replace("testvm", self.name)


def _commands(text: str) -> list[tuple[str, str]]:
    """Each command of a console block, and what it must print."""
    found: list[tuple[str, str]] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = 1
        while lines[length - 1].endswith("\\"):
            length += 1
        found.append(("\n".join(lines[:length]), "\n".join(lines[length:])))
    return found


def _compare(command: str, printed: str, expected: str) -> None:
    printed = _PROGRESS.sub("", printed).strip("\n")
    wanted = []
    for line in _PROGRESS.sub("", expected).strip("\n").splitlines():
        if line.strip() == "...":
            wanted.append(r"(?:.*\n)*?")
        else:
            pattern = _NUMBER.sub(r"\\d+(?:\\.\\d+)?", re.escape(line.rstrip()))
            pattern = _RULE.sub("-+", pattern)  # a table is as wide as its paths
            wanted.append(pattern.replace(r"\.\.\.", ".*") + r" *\n")
    assert re.fullmatch("".join(wanted), printed + "\n" if printed else ""), (
        f"$ {command}\nprinted:\n{printed}\nexpected:\n{expected}"
    )
