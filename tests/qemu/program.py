# SPDX-License-Identifier: MIT
"""The program ``qmpmirror`` under way: its output, signals to it, and a gate that holds it back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Layers

DRIVE = ("-drive", "if=virtio,format=qcow2,file={}")
BLOCKDEV = (
    *("-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"),
    *("-device", "virtio-blk-pci,drive=fmt0,id=dev0"),
)
PINNED = ("--bandwidth", "1", "--bytes", "--buf-size", "65536")
"""Holds a copy in the copying phase."""

GOES_ON = "blockjob shows it and ends it: --watch, --pivot, --abort\n"
"""What is said of a copy that is left running."""

HINT = "--finish ends what is left running as it was meant to end, --undo aborts it\n"
"""What `recover` says of one."""

DEADLINE = 60


def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; what it returned."""
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


@attrs.define
class Program:
    """A command line that is under way."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        freeze(self.process.pid)

    def thaw(self) -> int:
        self.signal(signal.SIGCONT)
        return self.end()

    def end(self) -> int:
        return self.process.wait(DEADLINE)

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds, while the program runs."""
        until(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr


GATE = """
import asyncio, sys

async def main(qemu, path, command):
    async def serve(client, to_client):
        server, to_server = await asyncio.open_unix_connection(qemu)

        async def pass_on(source, sink):
            while chunk := await source.read(65536):
                if command.encode() in chunk:
                    print("held", flush=True)
                    await asyncio.to_thread(sys.stdin.readline)
                sink.write(chunk)
            sink.close()

        await asyncio.gather(pass_on(client, to_server), pass_on(server, to_client))

    async with await asyncio.start_unix_server(serve, path) as listener:
        print("listens", flush=True)
        await listener.serve_forever()

asyncio.run(main(*sys.argv[1:]))
"""


@attrs.define
class Gate:
    """A socket before QEMU's that passes everything on, but holds a command until it is opened."""

    path: Path
    process: subprocess.Popen[str]

    @classmethod
    @contextlib.contextmanager
    def before(cls, vm: Qemu, command: str) -> Iterator[Gate]:
        path = vm.qmp.with_suffix(".gate")
        with subprocess.Popen(
            [sys.executable, "-c", GATE, vm.qmp, path, f'"execute":"{command}"'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            gate = cls(path, process)
            try:
                assert gate.says() == "listens"
                yield gate
            finally:
                process.kill()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def open(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)


def freeze(child: int) -> None:
    """Stop a child process, and wait until it stands still."""
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)


@attrs.define
class Scene:
    """A QEMU whose ``vda`` runs on ``snap2``, and the copy to be made of it."""

    vm: Qemu
    layers: Layers
    copy: Path
    folder: Path
    programs: list[Program]

    def begin(self, *options: str, domain: str = "", stderr: Any = None) -> Program:
        folder = self.folder / f"run{len(self.programs)}"
        folder.mkdir()
        words = ("blockcopy", domain or self.vm.name, "vda", self.copy, *options)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "qmpmirror", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=stderr or err,
            )
        self.programs.append(Program(process, folder))
        return self.programs[-1]

    def run(self, *options: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        program = self.begin(*options)
        return program.end(), program.stdout, program.stderr

    def pin(self, *options: str) -> Program:
        """Begin a copy that stays in the copying phase, and wait until it is there."""
        program = self.begin(*PINNED, "--verbose", *options)
        program.until(lambda: "Block Copy: [" in program.stderr or '"progress"' in program.stdout)
        return program

    def unpin(self) -> None:
        self.execute("block-job-set-speed", device=self.job["id"], speed=0)

    @property
    def execute(self) -> Callable[..., Any]:
        return self.vm.execute

    @property
    def job(self) -> dict[str, Any]:
        (job,) = [job for job in self.execute("query-jobs") if job["type"] == "mirror"]
        return dict(job)

    def reaches(self, status: str, job: str = "") -> None:
        """Wait for the status of the copy, or of another job."""
        job = job or self.job["id"]
        until(lambda: {"id": job, "status": status}.items() <= self.find(job).items())

    def find(self, job: str) -> dict[str, Any]:
        return next(dict(found) for found in self.execute("query-jobs") if found["id"] == job)

    @property
    def active(self) -> list[str]:
        """The backing chain under the guest's device, as QEMU has it open."""
        (drive,) = self.execute("query-block")
        image = drive["inserted"]["image"]
        chain = [image["filename"]]
        while "backing-image" in image:
            image = image["backing-image"]
            chain.append(image["filename"])
        return chain

    @property
    def source(self) -> str:
        return str(self.layers.snap2)

    def write(self, arguments: str) -> None:
        """Let the guest write."""
        (drive,) = self.execute("query-block")
        self.vm.io(drive["qdev"], f"write {arguments}")


def sent(transcript: Path) -> list[str]:
    """The commands that were sent, without those that only look at jobs."""
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    commands = [line["message"]["execute"] for line in lines if line["direction"] == "sent"]
    return [command for command in commands if command not in {"query-jobs", "query-block-jobs"}]


def answered(transcript: Path, command: str) -> bool:
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    ids = [line.get("id") for line in lines if line["message"].get("execute") == command]
    received = [line.get("id") for line in lines if line["direction"] == "received"]
    return bool(ids) and ids[-1] in received
