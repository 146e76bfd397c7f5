# SPDX-License-Identifier: MIT
"""Several qmpmirror processes on one QEMU, each behind a gate that holds one command back."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import attrs

from tests.qemu.program import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers

    Said = tuple[int, str, str]

PLAIN = ("-device", "virtio-blk-pci,drive=fmt0,id=dev0")
FILTERED = (
    *("-object", "throttle-group,id=limits"),
    *("-blockdev", "throttle,node-name=filter,throttle-group=limits,file=fmt0"),
    *("-device", "virtio-blk-pci,drive=filter,id=dev0"),
)
"""Under a filter a second job-complete aborts QEMU before 10.0.10."""


@attrs.define
class Gate:
    """A socket before QEMU's: it notes the commands that pass, and holds one back until opened.

    Attributes:
        path: where the client connects.
        monitor: QEMU's own socket.
        held_back: tells by its number and name whether a command is the one.
        sent: the commands that have passed.
        held: set when the command has come.
        opened: set to let it pass.
    """

    path: Path
    monitor: Path
    held_back: Callable[[int, str], bool]
    sent: list[str] = attrs.field(factory=list)
    held: threading.Event = attrs.field(factory=threading.Event)
    opened: threading.Event = attrs.field(factory=threading.Event)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen()
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            try:
                yield
            finally:
                self.opened.set()
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _serve(self, listener: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            listener.accept()[0] as client,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.connect(str(self.monitor))
            back = threading.Thread(target=_pass_on, args=(server, client))
            back.start()
            self._pass_commands(client, server)
            back.join()

    def _pass_commands(self, client: socket.socket, server: socket.socket) -> None:
        decoder, text = json.JSONDecoder(), ""
        with contextlib.suppress(OSError):
            while chunk := client.recv(65536):
                text = (text + chunk.decode()).lstrip()
                while text:
                    try:
                        message, end = decoder.raw_decode(text)
                    except ValueError:
                        break
                    self._pass_command(message["execute"])
                    server.sendall(text[:end].encode())
                    text = text[end:].lstrip()
            server.shutdown(socket.SHUT_RDWR)

    def _pass_command(self, command: str) -> None:
        if self.held_back(len(self.sent), command) and not self.held.is_set():
            self.held.set()
            self.opened.wait(DEADLINE)
        self.sent.append(command)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_RDWR)


@attrs.define
class Client:
    """A qmpmirror process behind a gate."""

    gate: Gate
    process: subprocess.Popen[str]

    def until_held(self) -> bool:
        """Wait until the gate holds a command back; False if the process has ended without it."""
        until(lambda: self.gate.held.is_set() or self.process.poll() is not None)
        return self.gate.held.is_set()

    def end(self) -> Said:
        """Open the gate and wait for the end: exit code, stdout, stderr."""
        self.gate.opened.set()
        stdout, stderr = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, stdout, stderr


@attrs.define
class Scene:
    """A QEMU whose ``vda`` runs on ``snap2``, and who talks to it."""

    vm: Qemu
    layers: Layers
    cli: Cli
    folder: Path
    stack: contextlib.ExitStack
    clients: list[Client] = attrs.field(factory=list)
    copies: int = 0

    def client(self, *words: str | Path, hold: str | int = "") -> Client:
        """Begin a command on a socket of its own, with a command held back by number or name."""
        number = len(self.clients)

        def held_back(index: int, command: str) -> bool:
            return hold in {index, command}

        monitor = self.vm.sockets[number % len(self.vm.sockets)]
        gate = Gate(self.folder / f"gate{number}", monitor, held_back)
        self.stack.enter_context(gate())
        command, *rest = map(str, words)
        line = [sys.executable, "-W", "error", "-m", "qmpmirror", command, str(gate.path), *rest]
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made = Client(gate, process)
        self.stack.callback(process.communicate)
        self.stack.callback(process.kill)
        self.clients.append(made)
        return made

    def held(self, command: str, *words: str | Path) -> Client:
        """The same, and wait until it is held back at a command."""
        made = self.client(*words, hold=command)
        assert made.until_held(), made.process.communicate()
        return made

    def mirroring(self) -> Path:
        """Start a shallow copy, and wait until it mirrors."""
        self.copies += 1
        copy = self.layers.folder / f"copy{self.copies}.qcow2"
        ran = self.cli("blockcopy", self.vm.name, "vda", copy, "--shallow", "--wait")
        assert ran.returncode == 0, ran.stderr
        return copy

    @property
    def execute(self) -> Callable[..., Any]:
        return self.vm.execute

    @property
    def job(self) -> str:
        """The only copy."""
        (job,) = [job for job in self.execute("query-jobs") if job["type"] == "mirror"]
        return str(job["id"])

    @property
    def active(self) -> str:
        """The image under the guest's device and its filter."""
        (drive,) = self.execute("query-block")
        image: str = drive["inserted"]["image"]["filename"]
        if image.startswith("json:"):
            image = json.loads(image.removeprefix("json:"))["file"]["file"]["filename"]
        return image

    def completions(self) -> int:
        """How many job-complete have been sent by all clients so far."""
        return sum(client.gate.sent.count("job-complete") for client in self.clients)

    def jobs(self, status: str) -> list[str]:
        """Ids of the copies in a status."""
        jobs = self.execute("query-jobs")
        return [job["id"] for job in jobs if (job["type"], job["status"]) == ("mirror", status)]

    def check_clean(self, image: str) -> None:
        """The guest must run on an image, and nothing may be left of the copy but that."""
        assert self.vm.running
        assert self.active == image
        assert self.execute("query-jobs") == []
        nodes = self.execute("query-named-block-nodes")
        assert not [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ())]
        ours = [n for n in nodes if n["node-name"].startswith("qmpmirror-")]
        assert {node["file"] for node in ours} <= {image}


@contextlib.contextmanager
def talk(
    boot: Boot, layers: Layers, cli: Cli, folder: Path, device: tuple[str, ...]
) -> Iterator[Scene]:
    """A QEMU with a socket for each of two clients; those that still run are killed."""
    vm = boot(
        *("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}"),
        *device,
        name=f"two-{os.urandom(6).hex()}",
        qmp_sockets=2,
    )
    with contextlib.ExitStack() as stack:
        yield Scene(vm, layers, cli, folder, stack)
