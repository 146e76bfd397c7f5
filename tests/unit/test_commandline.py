# SPDX-License-Identifier: MIT
"""What the command line of a QEMU says of an image; read from a real process's ``/proc``."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from qmpmirror import commandline
from qmpmirror.commandline import Given

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NESTED = {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.img", "aio": "native"}}
READING = {"driver": "copy-on-read", "file": NESTED}


@pytest.fixture
def given(tmp_path: Path) -> Iterator[Callable[..., Given]]:
    """Ask a process that has such a command line of the image ``disk.img`` in its folder."""
    started = []

    def ask(*words: str, path: str = "disk.img") -> Given:
        command = ["sh", "-c", "echo; read line", "qemu", *words]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=tmp_path)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()  # its command line is there now
        return commandline.given(process.pid, str(tmp_path / path))

    (tmp_path / "disk.img").touch()
    (tmp_path / "link.img").symlink_to("disk.img")
    yield ask
    for process in started:
        process.communicate()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-drive", "file=disk.img"], Given()),
        (["-drive", "file=disk.img,aio=native"], Given("native")),
        (["--drive", "aio=io_uring,file=disk.img"], Given("io_uring")),
        (["-drive", "file.filename=disk.img,file.aio=threads"], Given("threads")),
        (["-drive", "file=file:disk.img,aio=native"], Given("native")),
        (["-drive", "file=link.img,aio=native"], Given("native")),
        (["-drive", "file=disk.img,copy-on-read=on"], Given(copy_on_read=True)),
        (["-drive", "file=disk.img,copy-on-read=off"], Given()),
        (["-drive", "file=other.img,aio=native"], Given()),
        (["-drive", "file=other.img,aio=native", "-drive", "file=disk.img"], Given()),
        (["-blockdev", "file,filename=disk.img,aio=native,node-name=p"], Given("native")),
        (["-blockdev", "qcow2,file.filename=disk.img,file.aio=io_uring"], Given("io_uring")),
        (["-blockdev", json.dumps(NESTED)], Given("native")),
        (["-blockdev", json.dumps(READING)], Given("native")),
        (["-blockdev", "{no JSON"], Given()),
        (["-hda", "disk.img"], Given()),
        ([], Given()),
    ],
)
def test_what_is_given(given: Callable[..., Given], words: list[str], expected: Given) -> None:
    assert given(*words) == expected


def test_a_comma_in_the_path(given: Callable[..., Given], tmp_path: Path) -> None:
    (tmp_path / "a,b").touch()
    assert given("-drive", "file=a,,b,aio=native", path="a,b") == Given("native")


@pytest.mark.parametrize("pid", [None, 2**22 + 1])
def test_a_process_that_cannot_be_looked_at(pid: int | None) -> None:
    assert commandline.given(pid, "/disk.img") == Given()


@pytest.mark.parametrize("path", ["", "nbd://host/disk", 'json:{"driver": "null-co"}'])
def test_an_image_that_is_no_file(path: str) -> None:
    assert commandline.given(os.getpid(), path) == Given()
