# SPDX-License-Identifier: MIT
"""What tests on a real QEMU share: small chains, a writing guest, and what must not change.

What is no fixture is in modules beside this one, such as `tests.qemu.program`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pytest

import qmpmirror
from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph
from qmpmirror.testing.process import sibling
from tests.qemu.program import BLOCKDEV, Scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from qmpmirror.machine import _Connecting
    from qmpmirror.testing import ImageTools, Qemu
    from qmpmirror.testing.launcher import MonitoredProcess
    from qmpmirror.testing.plugin import QemuFactory

    Boot = QemuFactory
    Cli = Callable[..., subprocess.CompletedProcess[str]]
    GuestAgent = Callable[..., tuple[str, list[str]]]
    Unchanged = Callable[..., AbstractContextManager[None]]

_serial_numbers = itertools.count(1)


@attrs.frozen
class Layers:
    """The chain ``base <- snap1 <- snap2`` of 8 MiB; every layer holds data of its own.

    Attributes:
        base: the lowest image.
        snap1: the middle one.
        snap2: the active one.
        images: the image tools of the QEMU under test.
    """

    base: Path
    snap1: Path
    snap2: Path
    images: ImageTools

    @property
    def folder(self) -> Path:
        """Where the images are, and where copies go."""
        return self.base.parent

    def content(self, path: Path, fmt: str = "qcow2") -> bytes:
        """All that an image shows to a guest, its backing chain included; it may be in use."""
        raw = self.folder / f".content-{next(_serial_numbers)}.raw"
        command = [sibling(self.images.qemu, "qemu-img"), "convert", "-U", "-f", fmt, "-O", "raw"]
        subprocess.run([*command, path, raw], stdin=subprocess.DEVNULL, check=True)
        content = raw.read_bytes()
        raw.unlink()
        return content

    def chain(self, path: Path) -> list[str]:
        """The backing chain that the headers tell, the image itself first."""
        return self.images.chain(path)

    def has_format(self, fmt: str) -> bool:
        """Whether the QEMU under test was built with an image format."""
        command = [sibling(self.images.qemu, "qemu-img"), "create", "-f", fmt, "-o", "help", "x"]
        asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return asked.returncode == 0

    @staticmethod
    def digest(path: Path) -> str:
        """A hash of the file itself: it changes with the first write."""
        return hashlib.sha256(path.read_bytes()).hexdigest()


@attrs.define
class Guest:
    """Writes to a disk as a guest would, and remembers what the disk must hold.

    Attributes:
        vm: the QEMU.
        drive: the disk as ``query-block`` describes it.
        expected: what the disk must hold.
    """

    vm: Qemu
    drive: dict[str, Any]
    expected: bytearray
    _rounds: int = 0

    @classmethod
    def of(cls, vm: Qemu, content: bytes, number: int = 0) -> Guest:
        """The guest of the ``number``-th disk that has a medium; its disk holds ``content``."""
        drives = [drive for drive in vm.execute("query-block") if "inserted" in drive]
        return cls(vm, drives[number], bytearray(content))

    @property
    def device(self) -> str:
        """The device, as a QOM path or an id."""
        return str(self.drive["qdev"])

    def scribble(self) -> None:
        """Write 4 KiB, less than a cluster, on data of every layer and where there is none."""
        byte = 0xA0 + self._rounds
        for area in (0x00000, 0x40000, 0x80000, 0x400000, 0x600000):
            offset = area + 0x1000 * (2 * self._rounds + 1)
            self.vm.io(self.device, f"write -P {byte} {offset} 4096")
            self.expected[offset : offset + 0x1000] = bytes([byte]) * 0x1000
        self._rounds += 1

    def check(self) -> None:
        """Read the whole disk through the device, and compare it with what must be there."""
        unit = 0x1000
        blocks = [bytes(self.expected[at : at + unit]) for at in range(0, len(self.expected), unit)]
        offset = 0
        for block, run in itertools.groupby(blocks):
            length = len(block) * len(list(run))
            assert block == block[:1] * len(block), f"{offset:#x} holds several patterns"
            self.vm.io(self.device, f"read -P {block[0]} {offset} {length}")
            offset += length


class Connect(Protocol):
    """The ``connect`` fixture."""

    def __call__(self, vm: MonitoredProcess, **options: Any) -> _Connecting:
        """Connect the library to the first socket of a QEMU."""
        ...


@pytest.fixture
def layers(images: ImageTools, tmp_path: Path) -> Layers:
    """A small chain in a folder of its own."""
    folder = tmp_path / "images"
    folder.mkdir()
    base, snap1, snap2 = images.make_chain(folder, size="8M")
    return Layers(base, snap1, snap2, images)


@pytest.fixture
def boot(qemu: QemuFactory) -> Boot:
    """Start a QEMU of machine type pc under a name that no other one has."""

    def start(*arguments: str | Path, **options: Any) -> Qemu:
        name = f"attach-{os.getpid()}-{next(_serial_numbers)}"
        return qemu(*arguments, **{"machine": "pc", "name": name, **options}).start()

    return start


@pytest.fixture
def guest(layers: Layers) -> Callable[..., Guest]:
    """A factory of guests: ``guest(vm)`` is that of the first disk, which runs on ``snap2``."""

    def make(vm: Qemu, number: int = 0, image: Path | None = None, fmt: str = "qcow2") -> Guest:
        return Guest.of(vm, layers.content(image or layers.snap2, fmt), number)

    return make


@pytest.fixture
def connect() -> Connect:
    """Connect the library: ``async with connect(vm) as machine``."""

    def to(vm: MonitoredProcess, **options: Any) -> _Connecting:
        return qmpmirror.connect(str(vm.qmp), **options)

    return to


@pytest.fixture
def pinned() -> dict[str, Any]:
    """Options that hold a copy in the copying phase, until its bandwidth is set to 0."""
    return {"bandwidth": 1, "buf_size": 65536}


@pytest.fixture
def cli() -> Cli:
    """Run the command line: ``cli("blockcopy", ...)``."""

    def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qmpmirror", *map(str, words)],
            **{"timeout": 60, **options},
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def unchanged() -> Unchanged:
    """A context in which neither a QEMU's graph and jobs nor the files of a folder may change."""

    @contextlib.contextmanager
    def context(vm: MonitoredProcess, folder: Path) -> Iterator[None]:
        graph, files = GraphSnapshot.take(vm.execute), _digests(folder)
        yield
        assert_clean_graph(vm.execute, graph)
        assert _digests(folder) == files

    return context


def _digests(folder: Path) -> dict[str, str]:
    return {str(path): Layers.digest(path) if path.is_file() else "" for path in folder.rglob("*")}


@pytest.fixture
def scene(request: pytest.FixtureRequest, boot: Boot, layers: Layers) -> Iterator[Scene]:
    disk = getattr(request, "param", BLOCKDEV)
    vm = boot(*(word.format(layers.snap2) for word in disk), name=f"cli-{os.urandom(6).hex()}")
    made = Scene(vm, layers, layers.folder / "copy.qcow2", layers.folder.parent, [])
    yield made
    for program in made.programs:
        program.process.kill()
        program.process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[GuestAgent]:
    """A guest agent that has some file systems; its socket, and what it was asked."""
    listeners: list[socket.socket] = []

    def start(**replies: Any) -> tuple[str, list[str]]:
        asked: list[str] = []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path := str(tmp_path / "agent"))
        listener.listen()
        listeners.append(listener)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                for line in stream:
                    request = json.loads(line.lstrip(b"\xff"))
                    command = request["execute"]
                    reply = {"return": request.get("arguments", {}).get("id", 0)}
                    if "sync" not in command:
                        asked.append(command)
                        reply = replies.get(command.rpartition("-")[2], {"return": 3})
                    stream.write(json.dumps(reply).encode() + b"\n")
                    stream.flush()

        threading.Thread(target=serve, daemon=True).start()
        return path, asked

    yield start
    for listener in listeners:
        listener.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 640 KiB, which a remount can enlarge."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, stdin=subprocess.DEVNULL).returncode:
        pytest.skip("not permitted to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, stdin=subprocess.DEVNULL)
