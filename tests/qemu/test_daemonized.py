# SPDX-License-Identifier: MIT
"""A QEMU that daemonizes changes to the root folder; its relative paths mean what they meant."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.testing import ImageTools
    from tests.qemu.conftest import Cli


@attrs.frozen
class Daemon:
    """A QEMU that was started as people do it in a shell, in the folder of its images."""

    folder: Path
    name: str
    pid: int
    images: ImageTools

    def path(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(params=["PWD", "no PWD"])
def daemon(
    qemu_binary: str, images: ImageTools, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Daemon]:
    for name, backing in (("base.qcow2", None), ("top.qcow2", "base.qcow2")):
        images.create(tmp_path / name, "8M" if backing is None else None, backing=backing)
        images.io(tmp_path / name, "write -P 7 0 64k")
    name = f"daemon-{os.urandom(6).hex()}"
    environment = {**os.environ, "PWD": str(tmp_path)} if request.param == "PWD" else {"PWD": "/"}
    subprocess.run(
        [
            *(qemu_binary, "-name", name, "-machine", "pc", "-nodefaults", "-accel", "tcg", "-S"),
            *("-display", "none", "-daemonize", "-pidfile", "pid"),
            *("-qmp", "unix:qmp,server=on,wait=off"),
            *("-drive", "file=top.qcow2,format=qcow2,if=none,id=d0"),
            *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
        ],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    pid = int((tmp_path / "pid").read_text())
    yield Daemon(tmp_path, name, pid, images)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}/fd/0").exists())


def test_it_is_found_and_its_disk_is_shown(daemon: Daemon, cli: Cli) -> None:
    for domain in (daemon.name, str(daemon.pid), daemon.path("qmp")):
        run = cli("domblklist", domain)
        assert (run.returncode, run.stderr) == (0, "")
        assert f" vda      {daemon.path('top.qcow2')}\n" in run.stdout
    (line,) = [line for line in cli("list").stdout.splitlines() if daemon.name in line]
    assert daemon.path("qmp") in line
    assert "free" in line
    shown = cli("domblklist", daemon.name, "--chain").stdout
    assert "base.qcow2 [qcow2, " in shown


def test_a_shallow_copy_can_be_opened_again(daemon: Daemon, cli: Cli) -> None:
    copy = daemon.path("copy.qcow2")
    run = cli("blockcopy", daemon.name, daemon.path("top.qcow2"), copy, "--shallow", "--pivot")
    assert (run.returncode, run.stdout) == (0, "Successfully pivoted\n"), run.stderr
    assert daemon.images.chain(copy) == [copy, daemon.path("base.qcow2")]


def test_a_snapshot_goes_beside_its_image(daemon: Daemon, cli: Cli) -> None:
    run = cli("snapshot-create-as", daemon.name, "s1", "--disk-only")
    assert (run.returncode, run.stdout) == (0, "Domain snapshot s1 created\n"), run.stderr
    overlay = daemon.path("top.s1")
    expected = [overlay, daemon.path("top.qcow2"), daemon.path("base.qcow2")]
    assert daemon.images.chain(overlay) == expected


def test_its_own_images_are_no_destinations(daemon: Daemon, cli: Cli) -> None:
    run = cli("blockcopy", daemon.name, "vda", daemon.path("base.qcow2"), "--overwrite")
    assert run.returncode == 4
    assert "is the source disk itself, or in its backing chain" in run.stderr


def test_its_chain_is_moved(daemon: Daemon, cli: Cli) -> None:
    new = daemon.folder / "new"
    new.mkdir()
    run = cli("move-storage", daemon.name, "vda", new)
    assert (run.returncode, run.stdout) == (0, "Successfully moved\n"), run.stderr
    assert daemon.images.chain(new / "top.qcow2") == [
        str(new / "top.qcow2"),
        str(new / "base.qcow2"),
    ]
